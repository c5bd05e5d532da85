"""What `calibrate` gives: the ranges of a model's activations, and scales made of them."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from ..errors import CalibrationError, UnmatchedPatternWarning
from ..numerics import FP8_MAX, SCALE_FLOOR
from ..options import Scales
from ..patterns import Pattern, check_unmatched, first_match_of, matching, spellings
from ..version import __version__
from . import files
from .clipping import DEFAULT_PERCENTILE, Fit, check_algorithm, clipping, fit
from .records import LayerRecord, ModelRecord, matrices_of, unwrapped


@dataclass(eq=False)
class Calibration:
    """The ranges of the activations of one or more models.

    Attributes:
        models: by the names that they were calibrated under.
        environment: versions, and the date.
    """

    models: dict[str, ModelRecord]
    environment: dict[str, str]
    _modules: dict[str, weakref.ref[nn.Module]] = field(default_factory=dict, repr=False)

    def remember(self, modules: Mapping[str, nn.Module]) -> None:
        """Which modules were calibrated, for as long as they live."""
        self._modules |= {name: weakref.ref(module) for name, module in modules.items()}

    def record(self, model: nn.Module, name: str | None = None) -> ModelRecord:
        """What was recorded of ``model``: of its class, with the same layers of the same shapes.

        Args:
            name: which of several equal models. Without it, in the process that calibrated them, the very same module.

        Raises:
            TypeError: ``model`` is no module.
            CalibrationError: it is another model than those that were calibrated (it says what differs), there is none
                of this ``name``, or several fit.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, for example pipeline.transformer, got {type(model).__name__}")
        if not self.models:
            raise CalibrationError("this calibration holds nothing yet: leave the block of calibrate first")
        if name is not None and name not in self.models:
            raise CalibrationError(f"no model was calibrated as {name!r}; there are {', '.join(self.models)}")
        root = unwrapped(model)
        found = type(root).__name__, *matrices_of(root)
        among = list(self.models.values()) if name is None else [self.models[name]]
        differences = {record.name: record.difference(*found) for record in among}
        fitting = [record for record in among if not differences[record.name]]
        if not fitting:
            said = "; ".join(f"{name!r}: {difference}" for name, difference in differences.items())
            raise CalibrationError(f"this is a calibration of another model: {said}")
        same = [record for record in fitting if (ref := self._modules.get(record.name)) is not None and ref() is root]
        if len(fitting) > 1 and not same:
            names = " or ".join(f"name={record.name!r}" for record in fitting)
            raise CalibrationError(f"this model fits several that were calibrated; say which: {names}")
        return same[0] if same else fitting[0]

    def scales(
        self,
        model: nn.Module,
        algorithm: str = "amax",
        *,
        percentile: float = DEFAULT_PERCENTILE,
        name: str | None = None,
        ignored_layers: Iterable[str] = (),
    ) -> Scales:
        """The static input scales of ``model``'s linears.

        Args:
            algorithm: how the clipping value is found: "amax", "percentile" or "mse"; see
                `fp8_compile.calibration.clipping`.
            percentile: for "percentile".
            name: which of several equal models; see `record`.
            ignored_layers: patterns of the paths of layers that get no scale, as for quantization.

        Returns:
            A dict for the option ``activation_scales``: by path, as `fp8_compile.patterns.layer_path` gives it, the
            clipping value / 448, a positive float32.
            Linears that share a weight share a scale. One that never ran has none (`problems` names those).

        Raises:
            OptionError: ``algorithm`` or ``percentile`` is not valid.
            PatternError: an entry of ``ignored_layers`` is malformed or misspelt.
            CalibrationError: it is a calibration of another model; the model never ran; or layers have no honest scale:
                NaN or Inf in the input, or nothing but zeros. It names them.
        """
        check_algorithm(algorithm, percentile)
        patterns = tuple(Pattern(text).text for text in ignored_layers)
        record = self.record(model, name)
        if not record.layers:
            raise CalibrationError(f"no linear of {record.name!r} ran while it was calibrated", record.unseen)
        _check_patterns(patterns, (*record.linears, *record.layers))
        layers = [
            layer
            for layer in record.layers.values()
            if first_match_of(patterns, (name for path in layer.paths for name in spellings(path))) is None
        ]
        _refuse({path: layer.problem for layer in layers for path in layer.paths if layer.problem is not None})
        clips = clips_of(layers, algorithm, percentile)
        zero = f"percentile {percentile:g} of its input is zero; use another algorithm"
        _refuse(
            {
                path: zero
                for layer, clip in zip(layers, clips, strict=True)
                for path in layer.paths
                if clip / FP8_MAX < SCALE_FLOOR
            }
        )
        scales = (torch.tensor(clips, dtype=torch.float64) / FP8_MAX).float().tolist()
        found = {path: scale for layer, scale in zip(layers, scales, strict=True) for path in layer.paths}
        chosen = f"{algorithm} {percentile:g}" if algorithm == "percentile" else algorithm
        return Scales(found, f"{chosen} of {about(record)}; sizes: {sizes(record)}; {self.environment.get('date', '')}")

    def problems(self, model: nn.Module, name: str | None = None) -> dict[str, str]:
        """By path, why a linear of ``model`` has no scale: it never ran, or see `scales`.

        Raises:
            TypeError, CalibrationError: as `record`.
        """
        return self.record(model, name).problems

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to ``path``: JSON or safetensors, by its suffix; see docs/calibration.md.

        Raises:
            CalibrationError: the suffix is another one, nothing was recorded, or the file cannot be written.
        """
        if not self.models:
            raise CalibrationError("this calibration holds nothing yet: leave the block of calibrate first")
        files.write(list(self.models.values()), self.environment, Path(path))

    def table(self, worst: int = 10) -> str:
        """The ``worst`` layers of each model as text: those that one scale fits least, see `Summary`.

        Raises:
            CalibrationError: ``worst`` is below 1.
        """
        if worst < 1:
            raise CalibrationError(f"worst: expected a number of at least 1, got {worst!r}")
        parts = []
        for record in self.models.values():
            rows = [TABLE_HEADER, *(summary.cells for summary in summaries(record)[:worst])]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines = [
                "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
                for row in rows
            ]
            parts.append("\n".join([f"{record.name}: {about(record)}", *lines]))
        return "\n\n".join(parts)


def _check_patterns(patterns: Iterable[str], paths: tuple[str, ...]) -> None:
    """Complain of patterns that name none of ``paths``."""
    matched = matching(patterns, (name for path in paths for name in spellings(path)))
    for pattern in patterns:
        if pattern not in matched:
            check_unmatched(pattern, paths)
            warnings.warn(f"ignored_layers: {pattern!r} matched no layer", UnmatchedPatternWarning, stacklevel=3)


def _refuse(problems: Mapping[str, str]) -> None:
    if problems:
        shown = "; ".join(f"{path}: {problem}" for path, problem in list(problems.items())[:20])
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CalibrationError(
            f"no static scale for {shown}{more}. Keep such layers in high precision: "
            f"ignored_layers={list(problems)[:20]}",
            list(problems),
        )


def load_calibration(path: str | PathLike[str]) -> Calibration:
    """The calibration that `Calibration.save` wrote.

    Raises:
        CalibrationError: the file is missing, no calibration, of an unknown version, or damaged. It names the file and
            the value.
    """
    records, environment = files.read(Path(path))
    return Calibration({record.name: record for record in records}, environment)


def environment() -> dict[str, str]:
    """The versions of this process, and the date."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "fp8-compile": __version__}
    for package in ("diffusers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def clips_of(layers: list[LayerRecord], algorithm: str, percentile: float = DEFAULT_PERCENTILE) -> list[float]:
    """The clipping values of ``layers``."""
    if not layers:
        return []
    counts = torch.stack([layer.counts for layer in layers])
    amax = torch.tensor([layer.amax for layer in layers], dtype=torch.float64)
    return clipping(counts, amax, algorithm, percentile).tolist()


# --- whether one scale fits ---


@dataclass(frozen=True)
class Summary:
    """How well one scale, that of the amax, fits a layer over the whole trajectory.

    Attributes:
        layer: what was recorded.
        median: of the ranges of the steps; None if the layer ran outside of steps only.
        quietest: the smallest range of a step; the same.
        fit: what becomes of the values under the scale; None if the layer has none.
    """

    layer: LayerRecord
    median: float | None
    quietest: float | None
    fit: Fit | None

    @property
    def badness(self) -> tuple[float, float]:
        """What layers are sorted by: the share of subnormal values, then the amax over the quietest step.

        Not by SQNR, which a few huge values dominate, and those are represented well. Nor by ranges alone: E4M3 loses
        nothing where a step is ten times quieter than the loudest, as long as its values stay normal.
        """
        if self.fit is None:
            return math.inf, 0.0
        return self.fit.subnormal, _ratio(self.layer.amax, self.quietest) or 0.0

    @property
    def cells(self) -> tuple[str, ...]:
        """A row under `TABLE_HEADER`."""
        layer, found = self.layer, self.fit
        if found is None:
            return (layer.paths[0], f"{layer.amax:.4g}", *("-",) * 7)
        return (
            layer.paths[0],
            f"{layer.amax:.4g}",
            "-" if self.median is None else f"{self.median:.4g}",
            *(_text(_ratio(layer.amax, step)) for step in (self.median, self.quietest)),
            f"{100 * found.subnormal:.2f}",
            f"{100 * found.flushed:.2f}",
            "infinite" if math.isinf(found.sqnr) else f"{found.sqnr:.1f}",
            f"{len(layer.ranges) - layer.ranges.count(None)}",
        )


TABLE_HEADER = (
    "layer",
    "amax",
    "median step",
    "amax/median",
    "amax/quietest",
    "subnormal, %",
    "zero, %",
    "SQNR, dB",
    "steps",
)


def _ratio(amax: float, step: float | None) -> float | None:
    return None if step is None else amax / step if step else math.inf


def _text(ratio: float | None) -> str:
    return "-" if ratio is None else "infinite" if math.isinf(ratio) else f"{ratio:.3g}"


def summaries(record: ModelRecord) -> list[Summary]:
    """Of all layers of a model, the worst first."""
    found = []
    for layer in record.layers.values():
        ranges = [amax for amax in layer.ranges if amax is not None]
        found.append(
            Summary(
                layer,
                statistics.median(ranges) if ranges else None,
                min(ranges, default=None),
                None if layer.problem is not None else fit(layer.counts, layer.amax, layer.amax),
            )
        )
    return sorted(found, key=lambda summary: summary.badness, reverse=True)


def sizes(record: ModelRecord) -> str:
    """The two largest tensors among the arguments, for each size that the model ran at."""
    shown: dict[str, None] = {}
    for inputs in record.inputs:
        named = [(name, shape) for name, shapes in inputs.shapes.items() for shape in shapes]
        largest = sorted(named, key=lambda pair: math.prod(pair[1]), reverse=True)[:2]
        shown[", ".join(f"{name} {list(shape)}" for name, shape in largest)] = None
    return " or ".join(list(shown)[:3]) + (f" and {len(shown) - 3} others" if len(shown) > 3 else "")


def about(record: ModelRecord) -> str:
    """What was run, in a line."""
    return (
        f"{record.class_name}, {len(record.layers)} layers in {len(record.steps)} steps of {record.generations} "
        f"generations; layers {record.digest}"
    )
