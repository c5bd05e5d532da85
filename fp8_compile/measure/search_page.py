"""The result of a search as a page, and as text to paste."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .html import Plot, Point, render
from .results import environment, number_text, to_jsonable
from .search import Result, Search


def html(search: Search, result: Result) -> str:
    """One page with the result and the measurements that led to it; it needs no other file."""
    bound, pictures = search.bound, len(search.prompts) * len(search.seeds)
    rows, points = [], []
    for number, (kept, quality) in enumerate(search.state.measurements.items(), start=1):
        value = bound.of(quality)
        met = bound.met(value)
        names = ", ".join(search.names.shortest(kept)) or "nothing"
        rows.append([str(number), str(len(kept)), number_text(value, 4), "yes" if met else "no", names])
        if math.isfinite(value):
            points.append(Point(number, value, str(len(kept)), f"{number}: {len(kept)} kept: {names}", met))
    e = environment(search.variants.pipeline)
    label = f"{bound.metric}{', dB' if bound.metric == 'psnr' else ''} ({bound.statistic} of {pictures})"
    # Without a finite value (all pictures equal, or NaN) there is no scale to plot on.
    plot = Plot.of(points, "measurement", label, [(bound.value, str(bound))], path=True) if points else None
    return render(
        "search.html.j2",
        model=search.state.settings["pipeline"],
        about=[
            f"Asked for: {bound}. Found: {len(result.kept)} of {len(search.layers)} layers to keep, "
            f"{bound.metric} {number_text(bound.of(result.quality), 4)}, after {result.measurements} measurements.",
            f"Measured on {e['device']}, torch {e['torch']}, {e['date']}; {len(search.prompts)} prompts x "
            f"{len(search.seeds)} seeds, compiled, against compiled BF16 with the same noise.",
        ],
        notes=[
            "Without any one of its members the set does not meet the bound. It need not be the smallest of all.",
            how_to_use(result),
        ],
        result=paste(result),
        header=["#", "layers kept", bound.metric, "met", "kept"],
        rows=rows,
        plot=plot,
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
        text = "The list is for compiling block by block, as it was measured: what is outside the blocks stays in BF16."
        if others:
            text += (
                " fp8_compile.quantize_, Fp8DiffusionConfig and compiling the whole transformer convert that too: add "
                f"{', '.join(map(repr, others))} for those."
            )
        return text
    text = "The list is for compiling block by block or as a whole, fp8_compile.quantize_ and Fp8DiffusionConfig alike."
    if others:
        text += (
            f" Of it, {', '.join(map(repr, others))} were in BF16 in all measurements; without them those layers would "
            "be converted too, which was not measured."
        )
    if result.options.get("small_m", "weight-only") != "weight-only":
        text += " Leave small_m out at load time: the list names the layers with few rows."
    return text
