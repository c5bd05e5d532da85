"""A calibration as a page: the ranges of every layer against the steps, the worst first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..calibration import Calibration
from ..calibration.clipping import DEFAULT_PERCENTILE
from ..calibration.records import LayerRecord, ModelRecord, Step
from ..calibration.result import TABLE_HEADER, Summary, about, clips_of, summaries
from .html import Axis, Plot, Point, render

# Sparklines: their size, and how many octaves below the amax they show.
_WIDTH, _HEIGHT, _OCTAVES = 160, 32, 8

# Octaves that a plot shows at least: less would make mountains of what no scale can tell apart.
_SPAN = 3

# Calls in a plot: more could not be told apart.
_CALLS = 400


def write(calibration: Calibration, path: str | PathLike[str], worst: int = 12) -> None:
    """Write `html` to ``path``."""
    Path(path).write_text(html(calibration, worst), encoding="utf-8")


def html(calibration: Calibration, worst: int = 12) -> str:
    """One page with a table of all layers, and plots of the ``worst`` of each model; it needs no other file."""
    models = calibration.models.values()
    environment = ", ".join(f"{name} {value}" for name, value in calibration.environment.items())
    return render(
        "calibration.html.j2",
        title=", ".join(f"{record.name} ({record.class_name})" for record in models),
        environment=environment,
        notes=_NOTES,
        header=[*TABLE_HEADER, f"percentile {DEFAULT_PERCENTILE} / amax", "mse / amax", "range per call"],
        width=_WIDTH,
        height=_HEIGHT,
        models=[_model(record, worst) for record in models],
    )


_NOTES = [
    "Sorted by the share of the values (zeros aside) that the scale of the amax leaves below E4M3's smallest normal "
    'number, 2**-6 of a scale: their relative error grows, and below 2**-10 they become zero ("zero"). A layer with '
    "many of those, or with an amax far above its median step or its quietest one, is not served well by one scale.",
    "SQNR: of the amax's scale over all values. A few huge values dominate it, and those are represented well.",
    "percentile / amax, mse / amax: the clipping values of the other algorithms. 1: they clip nothing.",
    "Range per call: the largest magnitude in each call of the model, generations after one another; the box is "
    f"{_OCTAVES} octaves high, and its upper edge is the amax.",
]


@dataclass(frozen=True)
class _Row:
    """A layer in the table, and the lines of its sparkline."""

    cells: tuple[str, ...]
    lines: tuple[str, ...]


def _model(record: ModelRecord, worst: int) -> dict[str, Any]:
    found = summaries(record)
    layers = [summary.layer for summary in found]
    clips = {name: clips_of(layers, name) for name in ("percentile", "mse")}
    rows = []
    for i, summary in enumerate(found):
        amax = summary.layer.amax
        ratios = (f"{clips[name][i] / amax:.3g}" if summary.fit is not None else "-" for name in clips)
        rows.append(_Row((*summary.cells, *ratios), _sparkline(summary.layer, record.steps)))
    return {
        "name": record.name,
        "about": about(record),
        "inputs": [
            f"{inputs.calls} calls with {', '.join(f'{name} {_shapes(s)}' for name, s in inputs.shapes.items())}"
            for inputs in record.inputs
        ],
        "problems": [f"{path}: {problem}" for path, problem in record.problems.items()],
        "rows": rows,
        "plots": [
            (summary.layer.paths[0], _plot(summary, record.steps, {name: clips[name][i] for name in clips}))
            for i, summary in enumerate(found[:worst])
        ],
        "hidden": max(0, len(record.steps) - _CALLS),
    }


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join("x".join(map(str, shape)) or "a number" for shape in shapes)


def _sparkline(layer: LayerRecord, steps: tuple[Step, ...]) -> tuple[str, ...]:
    """The points of a line for each generation."""
    lines: dict[int, list[str]] = {}
    for call, (step, amax) in enumerate(zip(steps, layer.ranges, strict=True)):
        if amax:
            x = (call + 0.5) * _WIDTH / len(steps)
            y = min(1.0, math.log2(layer.amax / amax) / _OCTAVES) * (_HEIGHT - 4) + 2
            lines.setdefault(step.generation, []).append(f"{x:.1f},{y:.1f}")
    return tuple(" ".join(points) for points in lines.values())


def _plot(summary: Summary, steps: tuple[Step, ...], clips: dict[str, float]) -> Plot | None:
    """The range of each call; None if there is none above zero."""
    points = [
        Point(call, math.log2(amax), "", f"generation {step.generation}, call {step.index}{_at(step)}: {amax:.4g}")
        for call, (step, amax) in enumerate(zip(steps[:_CALLS], summary.layer.ranges[:_CALLS], strict=True))
        if amax
    ]
    if not points:
        return None
    top = math.log2(summary.layer.amax)
    rules = [(top, f"amax: {summary.layer.amax:.4g}")]
    rules += [(math.log2(clip), f"{name}: {clip:.4g}") for name, clip in clips.items() if 0 < clip < summary.layer.amax]
    heights = [*(point.y for point in points), *(y for y, _ in rules), top - _SPAN]
    return Plot(
        Axis.over("call of the model", [point.x for point in points], 84, 624),
        Axis.over("log2 of the largest magnitude", heights, 344, 16),
        tuple(points),
        _apart(rules, (max(heights) - min(heights)) / 20),
        path=True,
    )


def _apart(rules: list[tuple[float, str]], least: float) -> tuple[tuple[float, str], ...]:
    """``rules`` from above, those that are too near to the one before written beside it."""
    found: list[tuple[float, str]] = []
    for y, text in sorted(rules, reverse=True):
        if found and found[-1][0] - y < least:
            found[-1] = found[-1][0], f"{found[-1][1]}, {text}"
        else:
            found.append((y, text))
    return tuple(found)


def _at(step: Step) -> str:
    return "" if step.timestep is None else f" (timestep {step.timestep:.4g})"
