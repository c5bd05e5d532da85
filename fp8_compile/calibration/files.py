"""Calibrations as files: JSON to be read by people, safetensors to be small."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from .histogram import BINS_PER_OCTAVE, FINITE_BINS, bin_of
from .records import Features, Inputs, LayerRecord, ModelRecord, Step

FORMAT = "fp8_compile.calibration"
VERSION = 1
SUFFIXES = (".json", ".safetensors")

_LARGEST_COUNT = 2**63 - 1


def write(records: Sequence[ModelRecord], environment: Mapping[str, str], path: Path) -> None:
    """Write ``records`` to ``path``, which is complete when it has its name.

    Raises:
        CalibrationError: the suffix is none of `SUFFIXES`, or the file cannot be written.
    """
    check_suffix(path)
    data = {
        "format": FORMAT,
        "version": VERSION,
        "environment": dict(environment),
        "bins_per_octave": BINS_PER_OCTAVE,
        "models": [_model_to_dict(record) for record in records],
    }
    from safetensors import SafetensorError

    scratch = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        if path.suffix == ".json":
            scratch.write_text(_readable(data) + "\n", encoding="utf-8")
        else:
            _write_tensors(data, scratch)
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"cannot be written: {error}", file=path) from error
    finally:
        scratch.unlink(missing_ok=True)


def read(path: Path) -> tuple[list[ModelRecord], dict[str, str]]:
    """The records in ``path``, and the versions and the date of their making.

    Raises:
        CalibrationError: see `fp8_compile.load_calibration`.
    """
    check_suffix(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _read_tensors(path)
    except OSError as error:
        raise CalibrationError(f"cannot be read: {error}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"is no calibration: {error}", file=path) from error
    top = _Part(path, "", data)
    if top.get("format", str) != FORMAT:
        raise top.wrong("format", f"expected {FORMAT!r}, got {data['format']!r}")
    if top.get("version", int) != VERSION:
        raise top.wrong("version", f"{data['version']!r} is not known; this release reads version {VERSION}")
    if top.get("bins_per_octave", int) != BINS_PER_OCTAVE:
        raise top.wrong("bins_per_octave", f"expected {BINS_PER_OCTAVE}, got {data['bins_per_octave']!r}")
    environment = {name: top.part("environment").get(name, str) for name in top.get("environment", dict)}
    records = [_model(part) for part in top.parts("models")]
    if not records:
        raise top.wrong("models", "expected at least one")
    if len({record.name for record in records}) < len(records):
        raise top.wrong("models", "two have the same name")
    return records, environment


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither JSON nor safetensors by its name.

    Raises:
        CalibrationError: it is neither.
    """
    if path.suffix not in SUFFIXES:
        raise CalibrationError(f"expected a name that ends in {' or '.join(SUFFIXES)}", file=path)


# --- writing ---


def _model_to_dict(record: ModelRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "class": record.class_name,
        "digest": record.digest,
        "inputs": [
            {
                "shapes": {name: [list(s) for s in shapes] for name, shapes in inputs.shapes.items()},
                "calls": inputs.calls,
            }
            for inputs in record.inputs
        ],
        "steps": [[step.generation, step.index, step.timestep] for step in record.steps],
        "layers": [_layer_to_dict(layer) for layer in record.layers.values()],
        "linears": {path: list(features) for path, features in record.linears.items()},
        "others": {path: list(features) for path, features in record.others.items()},
    }


def _layer_to_dict(layer: LayerRecord) -> dict[str, Any]:
    bins = layer.counts.nonzero().squeeze(1)
    return {
        "paths": list(layer.paths),
        "amax": _short(layer.amax),
        "values": layer.values,
        "nonfinite": layer.nonfinite,
        "calls": layer.calls,
        "rows": list(layer.rows),
        "ranges": [None if amax is None else _short(amax) for amax in layer.ranges],
        "histogram": [[i, count] for i, count in zip(bins.tolist(), layer.counts[bins].tolist(), strict=True)],
    }


def _short(value: float) -> float:
    """A float32 with the 9 digits that give it back."""
    return float(f"{value:.9g}")


# How many levels below these keys have a line for each of their parts. All else is one line.
_LEVELS = {"models": 2, "layers": 2, "linears": 1, "others": 1}


def _readable(value: Any, levels: int = 1, pad: str = "\n") -> str:
    """JSON with a line for what a reader looks for, and no more lines than that."""
    if levels == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, allow_nan=False)
    inner = f"{pad} "
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(key)}: {_readable(item, max(levels - 1, _LEVELS.get(key, 0)), inner)}"
            for key, item in value.items()
        ]
        return f"{{{inner}{f',{inner}'.join(parts)}{pad}}}"
    return f"[{inner}{f',{inner}'.join(_readable(item, levels - 1, inner) for item in value)}{pad}]"


def _write_tensors(data: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for number, model in enumerate(data["models"]):
        layers = model["layers"]
        ranges = [[math.nan if amax is None else amax for amax in layer.pop("ranges")] for layer in layers]
        histograms = [layer.pop("histogram") for layer in layers]
        pairs = torch.tensor([pair for histogram in histograms for pair in histogram], dtype=torch.int64).view(-1, 2)
        tensors[f"{number}.ranges"] = torch.tensor(ranges, dtype=torch.float32).view(len(layers), len(model["steps"]))
        tensors[f"{number}.lengths"] = torch.tensor([len(h) for h in histograms], dtype=torch.int64)
        tensors[f"{number}.bins"] = pairs[:, 0].to(torch.int16)
        tensors[f"{number}.counts"] = pairs[:, 1].contiguous()
    save_file(tensors, path, metadata={"calibration": json.dumps(data, allow_nan=False)})


def _read_tensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if "calibration" not in metadata:
        raise ValueError("the metadata have no 'calibration'")
    data = json.loads(metadata["calibration"])
    # What is no list of layers here is refused with the same words as in JSON.
    models = data.get("models") if isinstance(data, dict) else None
    for number, model in enumerate(models if isinstance(models, list) else ()):
        layers = model.get("layers") if isinstance(model, dict) else None
        if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers):
            _put_arrays(layers, number, tensors)
    return data


def _put_arrays(layers: list[dict[str, Any]], number: int, tensors: Mapping[str, Tensor]) -> None:
    """Put the arrays of a model's layers back to where they are in JSON."""
    expected = {"ranges": torch.float32, "lengths": torch.int64, "bins": torch.int16, "counts": torch.int64}
    arrays = {}
    for name, dtype in expected.items():
        found = tensors.get(f"{number}.{name}")
        if found is None:
            raise ValueError(f"there is no tensor {number}.{name}")
        if found.dtype != dtype or found.dim() != (2 if name == "ranges" else 1):
            raise ValueError(f"{number}.{name} is {list(found.shape)} {found.dtype}")
        arrays[name] = found
    lengths = arrays["lengths"].tolist()
    if len(lengths) != len(layers) or len(arrays["ranges"]) != len(layers) or min(lengths, default=0) < 0:
        raise ValueError(f"{number}.lengths and {number}.ranges are not of {len(layers)} layers")
    if not sum(lengths) == len(arrays["bins"]) == len(arrays["counts"]):
        raise ValueError(f"{number}.bins and {number}.counts are not of {sum(lengths)} bins")
    pairs = torch.split(torch.stack([arrays["bins"].long(), arrays["counts"]], dim=1), lengths)
    for layer, ranges, histogram in zip(layers, arrays["ranges"].tolist(), pairs, strict=True):
        layer["ranges"] = [None if math.isnan(amax) else amax for amax in ranges]
        layer["histogram"] = histogram.tolist()


# --- reading ---


class _Part:
    """A part of what was read, which knows where it is in the file."""

    def __init__(self, path: Path, place: str, data: Any) -> None:
        self._path, self._place, self._data = path, place, data
        if not isinstance(data, dict):
            raise CalibrationError(f"{place or 'the whole'}: expected an object, got {_shown(data)}", file=path)

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of ``key``, which must be there and of this kind; a truth value is no number."""
        if key not in self._data:
            raise self.wrong(key, "is missing")
        value = self._data[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.wrong(key, f"expected {' or '.join(k.__name__ for k in kinds)}, got {_shown(value)}")
        return value

    def part(self, key: str) -> _Part:
        return _Part(self._path, self._at(key), self.get(key, dict))

    def parts(self, key: str) -> list[_Part]:
        return [_Part(self._path, f"{self._at(key)}[{i}]", item) for i, item in enumerate(self.get(key, list))]

    def count(self, key: str, low: int = 0) -> int:
        """A whole number of at least ``low``."""
        value: int = self.checked(key, self.get(key, int), lambda v: low <= v <= _LARGEST_COUNT, f"a number from {low}")
        return value

    def checked(self, key: str, value: Any, valid: Callable[[Any], bool], expected: str) -> Any:
        if not valid(value):
            raise self.wrong(key, f"expected {expected}, got {_shown(value)}")
        return value

    def each(self, key: str, valid: Callable[[Any], bool], expected: str) -> list[Any]:
        """A list of values that are all ``valid``."""
        for i, value in enumerate(self.get(key, list)):
            self.checked(f"{key}[{i}]", value, valid, expected)
        return list(self._data[key])

    def wrong(self, key: str, problem: str) -> CalibrationError:
        return CalibrationError(f"{self._at(key)}: {problem}", file=self._path)

    def _at(self, key: str) -> str:
        return f"{self._place}.{key}" if self._place else key


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= torch.finfo(torch.float32).max


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _is_step(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(map(_is_whole, value[:2]))
        and (value[2] is None or _is_number(value[2]))
    )


def _model(part: _Part) -> ModelRecord:
    linears, others = _features(part, "linears"), _features(part, "others")
    steps = part.each("steps", _is_step, "[generation, index, timestep or null]")
    layers: dict[str, LayerRecord] = {}
    known = {**linears, **others}
    for each in part.parts("layers"):
        layer = _layer(each, len(steps))
        for path in layer.paths:
            if path not in known:
                raise each.wrong("paths", f"{path!r} is no layer of this model")
            if path in layers:
                raise each.wrong("paths", f"{path!r} is there twice")
        layers |= dict.fromkeys(layer.paths, layer)
    record = ModelRecord(
        part.get("name", str),
        part.get("class", str),
        linears,
        others,
        tuple(_inputs(each) for each in part.parts("inputs")),
        tuple(Step(*step) for step in steps),
        {layer.paths[0]: layer for layer in layers.values()},
    )
    part.checked("digest", part.get("digest", str), lambda v: v == record.digest, f"{record.digest}, of its layers")
    return record


def _features(part: _Part, key: str) -> dict[str, Features]:
    features = part.part(key)
    found = {}
    for path in part.get(key, dict):
        shape = features.checked(path, features.get(path, list), _is_pair, "[output features, input features]")
        found[path] = (shape[0], shape[1])
    return found


def _inputs(part: _Part) -> Inputs:
    shapes = part.part("shapes")
    found = {
        name: tuple(
            tuple(shape)
            for shape in shapes.each(name, lambda v: isinstance(v, list) and all(map(_is_whole, v)), "a shape")
        )
        for name in part.get("shapes", dict)
    }
    return Inputs(found, part.count("calls", 1))


def _layer(part: _Part, steps: int) -> LayerRecord:
    paths = part.each("paths", lambda v: isinstance(v, str), "a path")
    amax = _float32(part.checked("amax", part.get("amax", (int, float)), _is_range, "a finite number from 0"))
    values, nonfinite = part.count("values"), part.count("nonfinite")
    rows = part.each("rows", _is_whole, "a whole number")
    ranges = part.each("ranges", lambda v: v is None or _is_range(v), "a finite number from 0, or null")
    histogram = part.each("histogram", lambda v: _is_pair(v) and v[0] < FINITE_BINS, "[bin, count]")
    part.checked("paths", paths, lambda v: len(v) > 0, "at least one path")
    part.checked("rows", rows, lambda v: len(v) == 2, "the fewest and the most")
    part.checked("ranges", ranges, lambda v: len(v) == steps, f"one for each of the {steps} steps")
    counts = torch.zeros(FINITE_BINS, dtype=torch.int64)
    bins = [i for i, _ in histogram]
    part.checked("histogram", histogram, lambda _: len(set(bins)) == len(bins), "each bin once")
    counts[torch.tensor(bins, dtype=torch.int64)] = torch.tensor([count for _, count in histogram], dtype=torch.int64)
    if sum(count for _, count in histogram) + nonfinite != values:
        raise part.wrong("histogram", f"its counts and nonfinite ({nonfinite}) do not add up to values ({values})")
    top = max((i for i, count in histogram if count), default=0)
    if int(bin_of(torch.tensor(amax, dtype=torch.float32))) != top:
        raise part.wrong("amax", f"{amax:.9g} is not in the highest bin of the histogram, {top}")
    loudest = max((_float32(r) for r in ranges if r is not None), default=0.0)
    if loudest > amax:
        raise part.wrong("ranges", f"{loudest:.9g} is above the amax, {amax:.9g}")
    return LayerRecord(
        tuple(paths),
        amax,
        values,
        nonfinite,
        part.count("calls", 1),
        (rows[0], rows[1]),
        tuple(None if r is None else _float32(r) for r in ranges),
        counts,
    )


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
