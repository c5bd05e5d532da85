"""Find a small set of layers to keep in BF16 that meets a bound on quality, by measuring pictures.

    variants = Variants(pipe, {"granularity": "tensor"})
    search = Search(variants, Bound("relative_l2", 0.05), prompts, seeds, state=Path("search.json"), **call)
    print(search.run("blocks").patterns)

Every measurement draws all pictures by the compiled pipeline, and compares them with compiled BF16. What was measured
is written to a file at once, so that an interrupted search goes on where it stopped.

One graph is compiled for each choice of layers within one kind of block, and blocks of that kind share it. So a search
among whole blocks compiles two graphs (all in FP8, nothing in FP8) however many blocks there are.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import Fp8Error, NothingConvertedError
from ..options import Fp8Options
from ..passes.plan import weight_objection
from ..patterns import Pattern, is_adapter, layer_path
from ..runtime.binder import fingerprint
from ..schemes.fp8 import scheme_for
from .html import Plot, Point, render
from .quality import METRICS, Drawing, compare, require_lpips
from .results import check_writable, environment, number_text, quality_to_dict, to_jsonable, write_whole
from .variants import BF16, Patterns, Region, Variants

BY = ("layers", "blocks", "blocks-then-layers")
STATISTICS = ("worst", "mean")


class SearchError(Fp8Error, ValueError):
    """A search that cannot be made, or cannot be resumed with these settings."""


@dataclass(frozen=True)
class Bound:
    """The quality that is asked for.

    Attributes:
        metric: one of `quality.METRICS`.
        value: the greatest that is good enough where less is better (relative L2, LPIPS), else the least (PSNR in dB,
            SSIM, cosine).
        statistic: of all pictures, "worst" or "mean".

    Raises:
        SearchError: the metric or the statistic is not valid, or the value is none that the metric can have.
    """

    metric: str
    value: float
    statistic: str = "worst"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise SearchError(f"metric={self.metric!r} is not valid; valid: {', '.join(METRICS)}")
        if self.statistic not in STATISTICS:
            raise SearchError(f"statistic={self.statistic!r} is not valid; valid: {', '.join(STATISTICS)}")
        highest = 1.0 if self.metric in ("ssim", "cosine") else math.inf
        if isinstance(self.value, bool) or not isinstance(self.value, numbers.Real):
            raise SearchError(f"{self.metric} of {self.value!r}: no bound for it; a number belongs here")
        if not 0 < self.value <= highest or math.isinf(self.value):
            valid = "above 0" + (" and at most 1" if highest == 1 else "")
            raise SearchError(f"{self.metric} of {self.value!r}: no bound for it; a number {valid} belongs here")

    @property
    def less_is_better(self) -> bool:
        """Whether a picture is the nearer to its reference, the less the metric is."""
        return METRICS[self.metric] is min

    def of(self, quality: Mapping[str, Any]) -> float:
        """The value that the bound is for, from what `quality_to_dict` made; an infinite PSNR is None there."""
        value = quality[self.statistic][self.metric]
        return math.inf if value is None else float(value)

    def loss(self, value: float) -> float:
        """``value`` turned so that less is better; NaN is worst."""
        if math.isnan(value):
            return math.inf
        return value if self.less_is_better else -value

    def __str__(self) -> str:
        which = "of the worst picture" if self.statistic == "worst" else "in the mean of all pictures"
        return f"{self.metric} {which} {'at most' if self.less_is_better else 'at least'} {self.value:g}"


def smallest(units: Sequence[str], loss: Callable[[frozenset[str]], float], limit: float) -> frozenset[str]:
    """A small part of ``units`` to keep so that the loss is within the limit.

    1. Nothing kept: if that is good enough, nothing needs to be. All kept: if that is not, nothing helps.
    2. Each unit is measured as the only one that is not kept. The greater its loss, the earlier it shall be kept.
    3. Bisection finds how many of that order have to be kept.
    4. Each of those is tried without, the least first, until none can be left out.

    That takes about ``2 + n + log2(n)`` measurements and one for each unit that is kept; a set that is asked for
    again should not be measured again. The result has been measured to be good enough, and without any one of its
    members it has been measured not to be. It need not be the smallest of all: losses of units do not simply add up.

    Args:
        loss: of the model that keeps these units.
        limit: greatest loss that is good enough.

    Raises:
        SearchError: keeping everything is not good enough.
    """
    everything = frozenset(units)
    if loss(frozenset()) <= limit:
        return frozenset()
    if loss(everything) > limit:
        raise SearchError("even with everything kept that can be, the bound is not met; ask for less")
    alone = {unit: loss(everything - {unit}) for unit in units}
    ranked = sorted(units, key=alone.__getitem__, reverse=True)
    few, enough = 0, len(ranked)
    while enough - few > 1:
        middle = (few + enough) // 2
        if loss(frozenset(ranked[:middle])) <= limit:
            enough = middle
        else:
            few = middle
    kept = frozenset(ranked[:enough])
    while True:
        before = kept
        for unit in reversed(ranked):
            if unit in kept and loss(kept - {unit}) <= limit:
                kept -= {unit}
        if kept == before:
            return kept


@dataclass(frozen=True)
class Layer:
    """A linear that can be in FP8.

    Attributes:
        block: the path of the compiled block that it is in.
        path: in that block.
    """

    denoiser: str
    block: str
    path: str

    @property
    def full(self) -> str:
        """The path in the denoiser."""
        return f"{self.block}.{self.path}"


@dataclass(frozen=True)
class Result:
    """What `Search.run` found.

    Attributes:
        by: what was searched among.
        patterns: ``ignored_layers`` for each denoiser. But for "layers" they are for the whole model, and so name the
            layers of ``unmeasured`` too.
        kept: the layers that the search chose to keep.
        quality: with those kept, as `quality_to_dict` gives it.
        measurements: how many were made, those of earlier runs included.
        unmeasured: patterns for each denoiser that name the other layers that stayed in BF16 in every measurement, such
            as those outside the blocks, but would be converted where the whole model is.
        options: those that were measured with and are not the default.
    """

    by: str
    patterns: dict[str, tuple[str, ...]]
    kept: frozenset[Layer]
    quality: dict[str, Any]
    measurements: int
    unmeasured: dict[str, tuple[str, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Search:
    """Measurements of a pipeline with some layers kept in BF16, each made once.

    Args:
        variants: the pipeline, compiled block by block.
        bound: what is good enough. A state made for another bound is resumed, since every measurement holds all
            metrics; but for LPIPS, which is measured only where the bound is for it.
        prompts: a picture of each for every seed.
        seeds: of the initial noise.
        state: a file that every measurement is written to, and read from if it is there.
        progress: is told of every measurement.
        **call: for the pipeline's call.

    Raises:
        SearchError: the pipeline's model names no repeated blocks, there is no prompt or seed, or the state
            cannot be written or belongs to other settings.
        NothingConvertedError: no layer of the model becomes FP8.
        QualityError: the bound is for LPIPS, which cannot be measured, or ``call`` holds what differs by picture.
    """

    def __init__(
        self,
        variants: Variants,
        bound: Bound,
        prompts: Sequence[str],
        seeds: Sequence[int],
        state: str | os.PathLike[str],
        progress: Callable[[str], None] = lambda line: None,
        **call: Any,
    ) -> None:
        if not variants.by_block:
            raise SearchError(
                f"{', '.join(type(m).__name__ for m in variants.denoisers.values())}: a search needs models that name "
                "their repeated blocks, and compiles those"
            )
        for what, given in (("prompts", prompts), ("seeds", seeds)):
            if not given:
                raise SearchError(f"{what}={given!r}: at least one belongs here")
        if isinstance(prompts, str):
            raise SearchError(f"prompts={prompts!r}: a list of prompts belongs here, also for one")
        state = Path(state)
        try:
            check_writable(state)
        except OSError as error:
            raise SearchError(f"state={str(state)!r} cannot be written: {error}") from error
        if bound.metric == "lpips":
            require_lpips()
        self.variants, self.bound, self.prompts, self.seeds = variants, bound, list(prompts), list(seeds)
        self._call, self._path, self._progress = call, state, progress
        self._reference: tuple[Drawing, ...] | None = None
        self._in_fp8: tuple[Drawing, ...] | None = None
        self._prefix = len(variants.denoisers) > 1
        here = environment(variants.pipeline)
        self.settings = {
            "pipeline": type(variants.pipeline).__name__,
            "weights": _fingerprints(variants.pipeline, variants.denoisers),
            "scheduler": _scheduler(variants.pipeline),
            "options": to_jsonable(variants.options),
            "lpips": bound.metric == "lpips",
            "prompts": self.prompts,
            "seeds": self.seeds,
            "call": to_jsonable(call),
            **{name: here[name] for name in ("device", "torch", "diffusers", "fp8-compile")},
        }
        self._state = self._read()
        if not self._state["layers"]:
            self._state["layers"] = self._convertible()
        self.layers = tuple(
            Layer(denoiser, block, path)
            for denoiser, blocks in self._state["layers"].items()
            for block, paths in blocks.items()
            for path in paths
        )
        self._named: dict[str, frozenset[Layer]] = {}
        for layer in self.layers:
            for name in (self._kind(layer), self._block(layer), self._single(layer)):
                self._named[name] = self._named.get(name, frozenset()) | {layer}
        self._known: dict[frozenset[Layer], dict[str, Any]] = {}
        for measured in self._state["measurements"]:
            self._check_measurement(measured)
            self._known[self._expand(measured["kept"])] = measured["quality"]

    def run(self, by: str = "layers") -> Result:
        """Search, measuring what is not known yet.

        Args:
            by: "layers" keeps or converts a layer in all blocks alike, so that the patterns serve compilation block by
                block. "blocks" keeps whole blocks. "blocks-then-layers" goes on to single layers of those.

        Raises:
            SearchError: ``by`` is not valid, or the bound cannot be met.
        """
        if by not in BY:
            raise SearchError(f"by={by!r} is not valid; valid: {', '.join(BY)}")
        limit = self.bound.loss(self.bound.value)

        def loss(units: frozenset[str]) -> float:
            return self.bound.loss(self.bound.of(self.measure(self._expand(units))))

        name = self._kind if by == "layers" else self._block
        kept = smallest(list(dict.fromkeys(name(layer) for layer in self.layers)), loss, limit)
        if by == "blocks-then-layers" and kept:
            inside = self._expand(kept)
            kept = smallest([self._single(layer) for layer in self.layers if layer in inside], loss, limit)
        layers = self._expand(kept)
        patterns, unmeasured = self._patterns(kept, by), self._unmeasured()
        if by != "layers":
            patterns = {name: (*chosen, *unmeasured[name]) for name, chosen in patterns.items()}
        quality = self.measure(layers)
        options = Fp8Options.parse(self.variants.options).changed()
        return Result(by, patterns, layers, quality, len(self._known), unmeasured, options)

    def measure(self, kept: frozenset[Layer]) -> dict[str, Any]:
        """The quality with ``kept`` in BF16, as `quality_to_dict` gives it; drawn only if it is not known."""
        if kept not in self._known:
            if self._reference is None:
                self._progress("compiling and drawing in BF16")
                self._reference = self._draw(lambda region: BF16)
            quality = quality_to_dict(compare(self._reference, self._draw_with(kept), self.settings["lpips"]))
            self._known[kept] = quality
            self._state["measurements"].append({"kept": self._names(kept), "quality": quality})
            self._write()
            value = self.bound.of(quality)
            met = "met" if self.bound.loss(value) <= self.bound.loss(self.bound.value) else "not met"
            self._progress(
                f"{len(self._known)}: {len(kept)} of {len(self.layers)} layers kept, "
                f"{self.bound.metric} {number_text(value, 4)}: {met}"
            )
        return self._known[kept]

    def _draw_with(self, kept: frozenset[Layer]) -> tuple[Drawing, ...]:
        if not kept and self._in_fp8 is not None:  # drawn to see which layers become FP8
            return self._in_fp8
        inside: dict[tuple[str, str], list[str]] = {}
        for layer in kept:
            inside.setdefault((layer.denoiser, layer.block), []).append(layer.path)
        return self._draw(lambda region: self._kept_in(region, inside.get((region.denoiser, region.path), [])))

    def _draw(self, patterns_of: Callable[[Region], Patterns]) -> tuple[Drawing, ...]:
        self.variants.use(patterns_of)
        return self.variants.draw(self.prompts, self.seeds, **self._call)

    def _kept_in(self, region: Region, paths: Sequence[str]) -> tuple[str, ...]:
        convertible = self._state["layers"][region.denoiser].get(region.path, [])
        if paths and len(paths) == len(convertible):
            return ("*",)
        linears = _linears(region.module)
        return tuple(sorted(_exactly(path, linears) for path in paths))

    def _convertible(self) -> dict[str, dict[str, list[str]]]:
        """The layers that become FP8 if none is kept, by denoiser and block."""
        self._progress("compiling and drawing in FP8")
        self._in_fp8 = self._draw(lambda region: ())
        reports = self.variants.reports(())
        found: dict[str, dict[str, list[str]]] = {}
        for region in self.variants.regions:
            prefix = f"{region.path}."
            rows = [row for row in reports[region.denoiser].layers if row.path.startswith(prefix)]
            paths = [row.path.removeprefix(prefix) for row in rows if row.decision == "fp8"]
            found.setdefault(region.denoiser, {})[region.path] = paths
        if not any(paths for blocks in found.values() for paths in blocks.values()):
            reasons = sorted({row.reason for told in reports.values() for row in told.layers})
            raise NothingConvertedError(f"no layer of the model became FP8: {'; '.join(reasons)}")
        return found

    def _kind(self, layer: Layer) -> str:
        return layer.path

    def _block(self, layer: Layer) -> str:
        return f"{layer.denoiser}:{layer.block}" if self._prefix else layer.block

    def _single(self, layer: Layer) -> str:
        return f"{layer.denoiser}:{layer.full}" if self._prefix else layer.full

    def _expand(self, names: Iterable[str]) -> frozenset[Layer]:
        return frozenset(layer for name in names for layer in self._named[name])

    def _names(self, kept: frozenset[Layer]) -> list[str]:
        """Few names that say what is kept: kinds of layers if they do, else blocks, else single layers."""
        kinds = [name for name in dict.fromkeys(map(self._kind, self.layers)) if self._named[name] <= kept]
        if self._expand(kinds) == kept:
            return kinds
        blocks = [name for name in dict.fromkeys(map(self._block, self.layers)) if self._named[name] <= kept]
        rest = kept - self._expand(blocks)
        return [*blocks, *(self._single(layer) for layer in self.layers if layer in rest)]

    def _patterns(self, kept: frozenset[str], by: str) -> dict[str, tuple[str, ...]]:
        found = {}
        for denoiser, model in self.variants.denoisers.items():
            linears = _linears(model)
            chosen: dict[str, None] = {}
            for layer in self.layers:
                if layer.denoiser != denoiser:
                    continue
                if by == "layers" and self._kind(layer) in kept:
                    chosen[_exactly(layer.path, linears, anywhere=True)] = None
                elif self._block(layer) in kept:
                    chosen[_exactly(layer.block, linears)] = None
                elif self._single(layer) in kept:
                    chosen[_exactly(layer.full, linears)] = None
            found[denoiser] = tuple(chosen)
        return found

    def _unmeasured(self) -> dict[str, tuple[str, ...]]:
        """Patterns for the layers that could be in FP8 but were in none of the measurements."""
        options = Fp8Options.parse(self.variants.options)
        scheme = scheme_for(options)
        found = {}
        for denoiser, model in self.variants.denoisers.items():
            linears = _linears(model)
            measured = {layer.full for layer in self.layers if layer.denoiser == denoiser}
            blocks = [region.path for region in self.variants.regions if region.denoiser == denoiser]
            chosen: dict[str, None] = {}
            for name, module in model.named_modules():
                path = layer_path(name)
                if not isinstance(module, nn.Linear) or is_adapter(name) or path in measured:
                    continue
                features = (module.in_features, module.out_features)
                if weight_objection(module.weight, features, options) or scheme.refuses(*features, module.weight.dtype):
                    continue  # stays in BF16 in any case
                if not any(Pattern(pattern).matches(path) for pattern in chosen):
                    chosen[_widest(path, linears, measured, blocks)] = None
            found[denoiser] = tuple(chosen)
        return found

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {"settings": self.settings, "layers": {}, "measurements": []}
        try:
            state = json.loads(self._path.read_text())
            there = state["settings"]
            differ = sorted(name for name in {*self.settings, *there} if self.settings.get(name) != there.get(name))
            layers, measurements = state["layers"], state["measurements"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SearchError(f"{str(self._path)!r} is no state of a search: {error}; remove it") from error
        if not isinstance(layers, dict) or not isinstance(measurements, list):
            raise self._damaged("a table of layers and a list of measurements belong there")
        if differ:
            told = "; ".join(f"{name}: {there.get(name)!r}, now {self.settings.get(name)!r}" for name in differ)
            raise SearchError(
                f"{str(self._path)!r} belongs to a search with other settings ({told}); ask for the same, or begin a "
                "new search elsewhere"
            )
        blocks: dict[str, set[str]] = {}
        for region in self.variants.regions:
            blocks.setdefault(region.denoiser, set()).add(region.path)
        # Empty before the first measurement.
        if layers and set(layers) != set(blocks):
            raise self._damaged(f"layers is {layers!r}; {', '.join(blocks)} belong there")
        for denoiser, of in layers.items():
            if not isinstance(of, dict) or set(of) != blocks[denoiser]:
                raise self._damaged(f"layers of {denoiser!r} are {of!r}; its blocks belong there")
            for block, paths in of.items():
                if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                    raise self._damaged(f"layers of {block!r} are {paths!r}; a list of paths belongs there")
        result: dict[str, Any] = state
        return result

    def _check_measurement(self, measured: Any) -> None:
        metrics = [metric for metric in METRICS if metric != "lpips" or self.settings["lpips"]]
        try:
            self._expand(measured["kept"])
            values = {(s, m): measured["quality"][s][m] for s in STATISTICS for m in metrics}
        except (KeyError, TypeError) as error:
            raise self._damaged(f"a measurement lacks or does not know {error}") from error
        for (statistic, metric), value in values.items():
            if not (
                value is None or value == "NaN" or (isinstance(value, (int, float)) and not isinstance(value, bool))
            ):
                raise self._damaged(f"the {statistic} {metric} of a measurement is {value!r}; a number belongs there")

    def _damaged(self, problem: str) -> SearchError:
        return SearchError(f"{str(self._path)!r} is no state of a search: {problem}; remove it")

    def _write(self) -> None:
        write_whole(self._path, json.dumps(self._state, indent=1, allow_nan=False) + "\n")

    def html(self, result: Result) -> str:
        """One page with the result and the path to it; it needs no other file."""
        rows, points = [], []
        metric = self.bound.metric
        for number, measured in enumerate(self._state["measurements"], start=1):
            kept = self._expand(measured["kept"])
            value = self.bound.of(measured["quality"])
            met = self.bound.loss(value) <= self.bound.loss(self.bound.value)
            names = ", ".join(measured["kept"]) or "nothing"
            rows.append([str(number), str(len(kept)), number_text(value, 4), "yes" if met else "no", names])
            if math.isfinite(value):
                points.append(Point(number, value, str(len(kept)), f"{number}: {len(kept)} kept: {names}", met))
        e = environment(self.variants.pipeline)
        unit = ", dB" if metric == "psnr" else ""
        label = f"{metric}{unit} ({self.bound.statistic} of {len(self.prompts) * len(self.seeds)})"
        return render(
            "search.html.j2",
            model=self.settings["pipeline"],
            about=[
                f"Asked for: {self.bound}. Found: {len(result.kept)} of {len(self.layers)} layers to keep, "
                f"{metric} {number_text(self.bound.of(result.quality), 4)}, after {result.measurements} measurements.",
                f"Measured on {e['device']}, torch {e['torch']}, {e['date']}; {len(self.prompts)} prompts x "
                f"{len(self.seeds)} seeds, compiled, against compiled BF16 with the same noise.",
            ],
            notes=[
                "Without any one of its members the set does not meet the bound. It need not be the smallest of all.",
                how_to_use(result),
            ],
            result=paste(result),
            header=["#", "layers kept", metric, "met", "kept"],
            rows=rows,
            # Without a finite value (all pictures equal, or NaN) there is no scale to plot on.
            plot=Plot.of(points, "measurement", label, [(self.bound.value, str(self.bound))], path=True)
            if points
            else None,
        )


def paste(result: Result) -> str:
    """The options that were measured, as Python source."""
    lines = [f"options = {_source({**result.options, 'ignored_layers': list(p)})}" for p in result.patterns.values()]
    if len(lines) == 1:
        return lines[0]
    return "\n".join(f"{name}: {line}" for name, line in zip(result.patterns, lines, strict=True))


def _source(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {_source(item)}' for name, item in value.items())}}}"
    return str(to_jsonable(value)) if callable(value) else repr(value)


def how_to_use(result: Result) -> str:
    """Where the patterns of ``result`` mean what was measured."""
    others = [pattern for patterns in result.unmeasured.values() for pattern in patterns]
    if result.by == "layers":
        told = "The list is for compiling block by block, as it was measured: what is outside the blocks stays in BF16."
        if others:
            told += (
                " fp8_compile.quantize_, Fp8DiffusionConfig and compiling the whole transformer convert that too: add "
                f"{', '.join(map(repr, others))} for those."
            )
        return told
    told = (
        "The list names blocks by index, which a graph that serves all blocks cannot tell apart: give it to "
        "fp8_compile.quantize_ or Fp8DiffusionConfig before compiling block by block, or compile the whole transformer."
    )
    if others:
        told += (
            f" Of it, {', '.join(map(repr, others))} were in BF16 in all measurements; without them those layers would "
            "be converted too, which was not measured."
        )
    if result.options.get("few_rows", "weight-only") != "weight-only":
        told += " Leave few_rows out at load time: the list names the layers with few rows."
    return told


def _widest(path: str, linears: Sequence[str], measured: Iterable[str], blocks: Sequence[str]) -> str:
    """A pattern for the layer at ``path`` and as many others as can be, none of them ``measured``."""
    measured = list(measured)
    block = next((b for b in blocks if path.startswith(f"{b}.")), None)
    segments = path.split(".")
    if block is not None:  # in all blocks alike, if it may be
        kind = path.removeprefix(f"{block}.")
        if not any(f".{other}".endswith(f".{kind}") for other in measured):
            return _exactly(kind, linears, anywhere=True)
    for count in range(1, len(segments)):
        prefix = ".".join(segments[:count])
        if not any(other.startswith(f"{prefix}.") for other in measured):
            return _exactly(prefix, linears)
    return _exactly(path, linears)


def _linears(module: nn.Module) -> list[str]:
    return [layer_path(path) for path, child in module.named_modules() if isinstance(child, nn.Linear)]


def _exactly(path: str, linears: Sequence[str], anywhere: bool = False) -> str:
    """A pattern for the layers at ``path`` or under it: the path itself, if it names no others of ``linears``.

    ``anywhere``: layers whose paths end in ``path`` are meant as well.
    """

    def meant(linear: str) -> bool:
        return f".{linear}".endswith(f".{path}") if anywhere else f"{linear}.".startswith(f"{path}.")

    if all(Pattern(path).matches(linear) == meant(linear) for linear in linears):
        return path
    return rf"re:(^|\.){re.escape(path)}$" if anywhere else rf"re:^{re.escape(path)}(\.|$)"


def _fingerprints(pipeline: Any, denoisers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Of all modules of the pipeline: the text encoders and the VAE make the pictures as well."""
    components = {**getattr(pipeline, "components", {}), **denoisers}
    return {name: _fingerprint(part) for name, part in components.items() if isinstance(part, nn.Module)}


def _scheduler(pipeline: Any) -> Any:
    scheduler = getattr(pipeline, "scheduler", None)
    return (
        None if scheduler is None else [type(scheduler).__name__, to_jsonable(dict(getattr(scheduler, "config", {})))]
    )


def _fingerprint(model: nn.Module) -> str:
    """Of all weights and their names: another checkpoint, or a LoRA fused into it, has another one."""
    with torch.no_grad():
        parts = [
            f"{name} {int(fingerprint(part))}"
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            for part in _stored(tensor)
        ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What ``tensor`` keeps in memory: itself, or the parts of an FP8 weight, of a text encoder for example."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(tensor, name))]
