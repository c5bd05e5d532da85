"""What each choice of layers that stay in BF16 costs in time and memory, and gains in quality: measured end to end.

    variants = Variants(pipe, {"granularity": "row"})
    found = ablate(variants, groups_for(pipe.transformer), prompts, seeds, num_inference_steps=30)
    print(found.markdown())

Every row is compiled as it would be used. Its reference is the same pipeline in BF16, compiled by the same inner
backend, with the same initial noise. Times are of denoising steps, of the variants in turn (A B C A B C ...), so
that a slow moment of the machine meets all of them alike; compared are medians.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import Fp8Error, NothingConvertedError
from ..patterns import check_unmatched, first_match, layer_path
from ..recipes import Groups
from .html import LOSSLESS_SIDE, Plot, Point, amplification, data_uri, difference, render
from .quality import Comparison, Drawing, compare, following, require_lpips
from .results import (
    check_writable,
    environment,
    number_text,
    quality_to_dict,
    quartiles,
    to_jsonable,
    write_whole,
)
from .scenes import SceneError
from .variants import BF16, Patterns, Variants

BASELINE = "compiled BF16"

# What they are called in a table, and digits after the point.
_METRICS = {
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 3),
    "relative_l2": ("relative L2", 3),
    "cosine": ("cosine", 4),
    "lpips": ("LPIPS", 3),
}


ONE_STEP = "one step cannot be timed, since only its end is known; take two or more"


class AblationError(Fp8Error, ValueError):
    """A choice of layers, or a call, that cannot be measured."""


@dataclass(frozen=True)
class AblationRow:
    """One configuration.

    Attributes:
        ignored_layers: its patterns; None for `BASELINE`.
        fp8_layers: how many linears are in FP8.
        weight_bytes: what compiled code reads of all linear weights of the denoisers, FP8 and others.
        step_seconds: of every timed step.
        peak_bytes: of GPU memory above what was taken before a picture was drawn; None on other devices.
        drawings: its pictures.
        quality: against `BASELINE`; None for itself.
        following: per attribute (right, of), where all prompts are captions of `scenes`; else None.
        failure: the error that ended its measurement, or empty. What had not been measured then is empty, zero or None.
    """

    name: str
    ignored_layers: tuple[str, ...] | None
    fp8_layers: int
    weight_bytes: int
    step_seconds: tuple[float, ...]
    peak_bytes: int | None
    drawings: tuple[Drawing, ...]
    quality: Comparison | None
    following: dict[str, tuple[int, int]] | None
    failure: str = ""


@dataclass(frozen=True)
class Ablation:
    """What `ablate` found; the first row is `BASELINE`.

    Attributes:
        model: class of the pipeline.
        settings: what was asked for.
        environment: where it was measured.
    """

    model: str
    rows: tuple[AblationRow, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def speedup(self, row: AblationRow) -> float:
        """``median(baseline) / median(row)`` of the seconds of a step; NaN where it was not timed."""
        if not row.step_seconds or not self.rows[0].step_seconds:
            return math.nan
        return statistics.median(self.rows[0].step_seconds) / statistics.median(row.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the pictures, as plain data. A PSNR of None is infinite: the pictures are equal."""
        return {
            "model": self.model,
            "settings": self.settings,
            "environment": self.environment,
            "rows": [
                {
                    "name": row.name,
                    "ignored_layers": None if row.ignored_layers is None else list(row.ignored_layers),
                    "fp8_layers": row.fp8_layers,
                    "weight_bytes": row.weight_bytes,
                    "step_seconds": dict(zip(("low", "median", "high"), quartiles(row.step_seconds), strict=True))
                    if row.step_seconds
                    else None,
                    "step_seconds_samples": list(row.step_seconds),
                    "speedup": self.speedup(row) if row.step_seconds and self.rows[0].step_seconds else None,
                    "peak_bytes": row.peak_bytes,
                    "quality": None if row.quality is None else quality_to_dict(row.quality),
                    "following": row.following,
                    "failure": row.failure,
                }
                for row in self.rows
            ],
        }

    def json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def markdown(self) -> str:
        """The table, with what it was measured on."""
        header, rows = self._table()
        lines = [f"# Which layers to keep in BF16: {self.model}", "", *(f"{_text(line)}\n" for line in self._about())]
        lines.append("| " + " | ".join(header) + " |")
        lines.append("|" + "|".join("---" if i in (1, 2) else "---:" for i in range(len(header))) + "|")
        lines += ["| " + " | ".join(_text(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", *(f"{line}\n" for line in self._notes())])

    def html(self, pictures: int = 2) -> str:
        """One page with the table, a plot, and the first ``pictures`` pictures of every row; it needs no other file.

        Raises:
            AblationError: ``pictures`` is below 1.
        """
        if pictures < 1:
            raise AblationError(f"pictures={pictures!r}: a number of at least 1 belongs here")
        header, rows = self._table()
        shown = range(min(pictures, len(self.rows[0].drawings)))
        references = [self.rows[0].drawings[i].image for i in shown]
        largest = max(
            (
                _bright(difference(references[i], row.drawings[i].image))
                for row in self.rows[1:]
                if row.drawings
                for i in shown
            ),
            default=0,
        )
        factor = amplification(largest)
        points = [
            Point(self.speedup(row), row.quality.mean["psnr"], str(number), f"{row.name}: {_told(row)}")
            for number, row in enumerate(self.rows, start=1)
            if row.quality is not None and row.step_seconds and math.isfinite(row.quality.mean["psnr"])
        ]
        return render(
            "ablation.html.j2",
            model=self.model,
            about=self._about(),
            notes=self._notes(),
            header=header,
            rows=rows,
            plot=Plot.of(points, f"speedup over compiled BF16 ({self.environment['device']})", "mean PSNR, dB")
            if points
            else None,
            amplification=factor,
            hidden=len(self.rows[0].drawings) - len(shown),
            small=max(max(image.size) for image in references) <= LOSSLESS_SIDE,
            drawings=[
                {
                    "prompt": self.rows[0].drawings[i].prompt,
                    "seed": self.rows[0].drawings[i].seed,
                    "shown": [
                        {
                            "number": number,
                            "name": row.name,
                            "image": data_uri(row.drawings[i].image),
                            "difference": data_uri(difference(references[i], row.drawings[i].image, factor))
                            if row.quality is not None
                            else None,
                            "told": f"PSNR {number_text(row.quality.rows[i].psnr, 1)} dB" if row.quality else "",
                        }
                        for number, row in enumerate(self.rows, start=1)
                        if row.drawings
                    ],
                }
                for i in shown
            ],
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        follows, peaks = self.rows[0].following is not None, self.rows[0].peak_bytes is not None
        header = ["#", "configuration", "kept in BF16", "FP8 layers", "weights, MB"]
        header += ["peak, MB"] if peaks else []
        header += ["ms per step [quartiles]", "speedup"]
        measured = next((row.quality.metrics for row in self.rows if row.quality is not None), ())
        header += [f"{_METRICS[metric][0]}: mean / worst" for metric in measured]
        header += ["follows the prompt"] if follows else []
        rows = []
        for number, row in enumerate(self.rows, start=1):
            cells = [str(number), f"{row.name} (failed: {row.failure})" if row.failure else row.name]
            cells += ["everything" if row.ignored_layers is None else ", ".join(row.ignored_layers) or "nothing"]
            cells += [str(row.fp8_layers), f"{row.weight_bytes / 1e6:.1f}"]
            if peaks:
                cells.append("-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}")
            if row.step_seconds:
                low, median, high = (1e3 * seconds for seconds in quartiles(row.step_seconds))
                cells += [f"{median:.1f} [{low:.1f}, {high:.1f}]", f"{self.speedup(row):.2f}"]
            else:
                cells += ["-", "-"]
            for metric in measured:
                q, digits = row.quality, _METRICS[metric][1]
                values = [] if q is None else [number_text(of[metric], digits) for of in (q.mean, q.worst)]
                cells.append(" / ".join(values) or "-")
            if follows:
                cells.append("-" if row.following is None else "{} of {}".format(*row.following["all"]))
            rows.append(cells)
        return header, rows

    def _about(self) -> list[str]:
        e, s = self.environment, self.settings
        call = ", ".join(f"{name} {value}" for name, value in s["call"].items())
        options = ", ".join(f"{name} {value}" for name, value in s["options"].items() if value is not None)
        return [
            f"Measured on {e['device']} ({e['threads']} CPU threads, load {e['load_average']}), torch {e['torch']}, "
            f"diffusers {e['diffusers']}, fp8-compile {e['fp8-compile']}, {e['date']}.",
            f"{len(s['prompts'])} prompts x {len(s['seeds'])} seeds; {call}; {options}.",
            *(["FP8 is slower than BF16 on a CPU: these times say nothing of a GPU."] if e["device"] == "cpu" else []),
        ]

    def _notes(self) -> list[str]:
        return [
            "Every row is compiled. Quality is against compiled BF16 with the same noise, mean and worst of all "
            "pictures; relative L2 and cosine are of the last latents.",
            f"Times: {len(self.rows[0].step_seconds)} denoising steps per row, of all rows in turn; the speedup is "
            "median over median. Weights: of all linear layers, as compiled code reads them.",
        ]


def ablate(
    variants: Variants,
    groups: Groups,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rounds: int = 3,
    perceptual: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    written: str | os.PathLike[str] | None = None,
    **call: Any,
) -> Ablation:
    """Measure every group of layers that stay in BF16, and BF16 itself.

    Args:
        variants: the pipeline. It is left with the last group in use; see `Variants.close`.
        groups: ``ignored_layers`` by the name of the row.
        prompts: a picture of each for every seed, for quality. The first is timed.
        seeds: of the initial noise.
        rounds: pictures that are timed per row.
        perceptual: measure LPIPS too.
        progress: is told what is being done.
        written: a JSON file that receives what is known as soon as a row is drawn, and after each round of timing, so
            that little is lost to an interruption.
        **call: for the pipeline's call, for example ``num_inference_steps``.

    Raises:
        AblationError: there are no groups, prompts, seeds or rounds, a pattern matches no linear of the compiled
            regions, a name is that of the baseline, there is only one step, whose time cannot be told, ``written``
            cannot be written, or every group failed. One that failed among others is a row with its error.
        NothingConvertedError: no layer of the model becomes FP8 in any row.
        QualityError: LPIPS is asked for and cannot be measured, or ``call`` holds what differs by picture; see `draw`.
    """
    _check(variants, groups, prompts, seeds, rounds, call)
    if written is not None:
        written = Path(written)
        try:
            check_writable(written)
        except OSError as error:
            raise AblationError(f"written={str(written)!r} cannot be written: {error}") from error
    if perceptual:
        require_lpips()
    choices: dict[str, Patterns] = {BASELINE: BF16, **{name: tuple(patterns) for name, patterns in groups.items()}}
    settings = {
        "prompts": list(prompts),
        "seeds": list(seeds),
        "rounds": rounds,
        "lpips": perceptual,
        "call": to_jsonable(call),
        "options": to_jsonable(variants.options),
    }
    where = environment(variants.pipeline)
    rows: dict[str, AblationRow] = {}

    def so_far() -> Ablation:
        found = Ablation(type(variants.pipeline).__name__, tuple(rows.values()), settings, where)
        if written is not None:
            write_whole(written, found.json())
        return found

    def failed(row: AblationRow, error: Exception) -> None:
        if row.name == BASELINE:  # there is nothing to compare with
            raise error
        rows[row.name] = replace(row, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
        progress(f"{row.name} failed: {rows[row.name].failure}")

    reasons: set[str] = set()
    for number, (name, patterns) in enumerate(choices.items(), start=1):
        progress(f"{number}/{len(choices)} {name}: compiling and drawing")
        rows[name] = AblationRow(name, patterns, 0, 0, (), None, (), None, None)
        try:
            variants.use_everywhere(patterns)
            drawings = variants.draw(prompts, seeds, **call)
            if len(drawings[0].latents) < 2:
                raise AblationError(ONE_STEP)
            told = variants.reports(patterns).values()
            totals = [r.totals for r in told]
            before = "bytes_before" if patterns is BF16 else "bytes_after"
            if patterns is not BF16:
                reasons |= {row.reason for r in told for row in r.layers}
            rows[name] = replace(
                rows[name],
                fp8_layers=sum(t["fp8"] for t in totals),
                weight_bytes=sum(t[before] for t in totals),
                drawings=drawings,
                quality=None if patterns is BF16 else compare(rows[BASELINE].drawings, drawings, perceptual),
                following=_following(drawings),
            )
        except Exception as error:  # whatever it is, the other rows are worth having
            failed(rows[name], error)
        so_far()
    failures = [f"{row.name}: {row.failure}" for row in rows.values() if row.failure]
    if len(failures) == len(groups):
        raise AblationError(f"every group failed: {'; '.join(failures)}")
    if not any(row.fp8_layers for row in rows.values()):
        raise NothingConvertedError(f"no layer of the model became FP8: {'; '.join(sorted(reasons))}")
    for done in range(rounds):
        progress(f"timing, round {done + 1} of {rounds}")
        for row in [row for row in rows.values() if not row.failure]:
            try:
                variants.use_everywhere(row.ignored_layers)
                taken, device = _start_of_peak(variants), variants.pipeline.device
                seconds = variants.step_seconds(prompts[0], seeds[0], **call)
                peak = None if taken is None else torch.cuda.max_memory_allocated(device) - taken
                rows[row.name] = replace(row, step_seconds=(*row.step_seconds, *seconds), peak_bytes=peak)
            except Exception as error:
                failed(row, error)
        so_far()
    return so_far()


def _check(
    variants: Variants,
    groups: Groups,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    call: Mapping[str, Any],
) -> None:
    """Refuse before any work what could only be found out in the middle of it."""
    for what, given in (("groups", groups), ("prompts", prompts), ("seeds", seeds)):
        if not given:
            raise AblationError(f"{what}={given!r}: at least one belongs here")
    if isinstance(prompts, str):
        raise AblationError(f"prompts={prompts!r}: a list of prompts belongs here, also for one")
    for name, patterns in groups.items():
        if isinstance(patterns, str):
            raise AblationError(f"{name!r}: {patterns!r}: a list of patterns belongs here, also for one")
    if not isinstance(rounds, numbers.Integral) or isinstance(rounds, bool) or rounds < 1:
        raise AblationError(f"rounds={rounds!r}: an integer of at least 1 belongs here")
    if call.get("num_inference_steps") == 1:
        raise AblationError(ONE_STEP)
    if BASELINE in groups:
        raise AblationError(f"{BASELINE!r} is the name of the unquantized row; name the group otherwise")
    paths = [
        layer_path(path)
        for region in variants.regions
        for path, module in region.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    known = list(dict.fromkeys(paths))
    for name, patterns in groups.items():
        for pattern in patterns:
            if not any(first_match([pattern], path) for path in known):
                check_unmatched(pattern, known, whole_model=not variants.by_block)
                raise AblationError(f"{name!r}: {pattern!r} matches none of the layers {', '.join(known)}")


def _start_of_peak(variants: Variants) -> int | None:
    device = torch.device(variants.pipeline.device)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _following(drawings: Sequence[Drawing]) -> dict[str, tuple[int, int]] | None:
    try:
        return following(drawings)
    except SceneError:
        return None


def _bright(image: Any) -> int:
    """The level that all but a hundredth of the values of ``image`` stay below; the few sharpest edges lie above."""
    import numpy as np

    return math.ceil(float(np.quantile(np.asarray(image), 0.99)))


def _text(line: str) -> str:
    """``line`` for Markdown, which would take ``<`` for the beginning of a tag."""
    return line.replace("&", "&amp;").replace("<", "&lt;")


def _told(row: AblationRow) -> str:
    return f"keeps {', '.join(row.ignored_layers or ()) or 'nothing'}"
