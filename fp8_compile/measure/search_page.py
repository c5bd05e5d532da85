"""The result of a search as a page, and as text to paste."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..weights.layers import SDPA
from .ablation_page import IN_VAIN
from .html import HEAT, LOSSLESS_SIDE, Plot, Point, data_uri, render
from .results import environment, number_text, to_jsonable
from .search import Result, Search, SearchError
from .search_pictures import LONGEST


def html(search: Search, result: Result, pictures: int | None = None) -> str:
    """One page with the result, the measurements that led to it, and their pictures; it needs no other file.

    Args:
        pictures: so many of every measurement. None: all that were measured.

    Raises:
        SearchError: ``pictures`` is below 1.
    """
    if pictures is not None and pictures < 1:
        raise SearchError(f"pictures: expected a number of at least 1, got {pictures!r}")
    bound, measured = search.bound, search.state.measurements
    samples = [(prompt, seed) for prompt in search.prompts for seed in search.seeds]
    chosen = 1 + list(measured).index(result.kept)
    pictured = _pictured(search, len(samples))
    rows, points = [], []
    for number, (kept, quality) in enumerate(measured.items(), start=1):
        value = bound.of(quality)
        met, names = bound.met(value), ", ".join(search.names.shortest(kept)) or "nothing"
        rows.append([str(number), str(len(kept)), number_text(value, 4), "yes" if met else "no", names])
        if math.isfinite(value):
            label, title = str(len(kept)), f"{number}: {len(kept)} kept: {names}"
            name = f"the result: {label}" if number == chosen else label
            points.append(Point(number, value, label, title, met, name, number if number in pictured else None))
    e = environment(search.variants.pipeline)
    axis = f"{bound.metric}{', dB' if bound.metric == 'psnr' else ''} ({bound.statistic} of {len(samples)})"
    # Without a finite value (all pictures equal, or NaN) there is no scale to plot on.
    plot = Plot.of(points, "measurement", axis, [(bound.value, str(bound))], path=True) if points else None
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
            *_of_attention(search),
        ],
        result=paste(result),
        header=["#", "layers kept", bound.metric, "met", "kept"],
        rows=rows,
        chosen=chosen,
        plot=plot,
        pictured=pictured,
        without=len(measured) + 1 - len(pictured),
        folder=str(search.pictures.folder),
        longest=LONGEST,
        small=bool(pictured) and search.pictures.size() <= LOSSLESS_SIDE,
        heat=HEAT,
        hidden=len(samples) - len(samples[:pictures]),
        left=0,
        right=chosen if chosen in pictured else 0,
        samples=[
            {"prompt": prompt, "seed": seed, "shown": [_shown(search, number, i, chosen) for number in pictured]}
            for i, (prompt, seed) in enumerate(samples[:pictures])
        ],
    )


def _pictured(search: Search, samples: int) -> list[int]:
    """The measurements whose pictures are there, 0 for BF16; none without that, which the others are compared with."""
    found = [n for n in range(len(search.state.measurements) + 1) if search.pictures.complete(n, samples)]
    return found if 0 in found else []


def _shown(search: Search, number: int, index: int, chosen: int) -> dict[str, Any]:
    """One picture of a measurement as the template shows it."""
    shown: dict[str, Any] = {"number": number, "image": data_uri(search.pictures.file(number, index).read_bytes())}
    if number == 0:
        return {**shown, "name": "compiled BF16", "heat": None, "quality": ""}
    kept, quality = list(search.state.measurements.items())[number - 1]
    psnr = quality["pictures"][index]["psnr"]
    return {
        **shown,
        "name": f"{len(kept)} kept" + (" (the result)" if number == chosen else ""),
        "heat": data_uri(search.pictures.file(number, index, "-heat").read_bytes()),
        "quality": f"PSNR {number_text(math.inf if psnr is None else float(psnr), 1)} dB",
    }


def _of_attention(search: Search) -> list[str]:
    """What the option ``attention`` asked for, and did not get."""
    if not search.variants.fp8_attention or any(layer.path.endswith(SDPA) for layer in search.layers):
        return []
    return [IN_VAIN]


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
