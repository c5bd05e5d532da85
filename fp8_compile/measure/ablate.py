"""Time, memory and quality of choices of layers that stay in BF16, measured end to end.

    variants = Variants(pipe, {"granularity": "row"})
    found = ablate(variants, groups_for(pipe.transformer), prompts, seeds, num_inference_steps=30)
    print(ablation_page.markdown(found))

Every row is compiled as it would be used. Its reference is the same pipeline in BF16, compiled by the same inner
backend, with the same initial noise. Times are of denoising steps, of the variants in turn (A B C A B C ...), so
that a slow moment of the machine meets all of them alike; compared are medians.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import NothingConvertedError
from ..patterns import check_unmatched, first_match
from ..recipes import Groups
from ..weights.layers import Tree
from .ablation import BASELINE, Ablation, AblationError, AblationRow
from .quality import Sample, compare, prompt_adherence, require_lpips
from .results import check_writable, environment, to_jsonable, write_whole
from .scenes import SceneError
from .variants import BF16, Patterns, Variants

__all__ = ["BASELINE", "ONE_STEP", "Ablation", "AblationError", "ablate"]

ONE_STEP = "one step cannot be timed, since only its end is known; take two or more"


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
        progress: is called with a line for each step of the work.
        written: a JSON file that gets the rows known so far, after the pictures of each row and after each round of
            timing, so that little is lost to an interruption.
        **call: for the pipeline's call, for example ``num_inference_steps``.

    Raises:
        AblationError: there are no groups, prompts, seeds or rounds, a pattern matches no linear of the compiled
            regions, a name is that of the baseline, there is only one step, which cannot be timed, ``written``
            cannot be written, or every group failed. One that failed among others is a row with its error.
        NothingConvertedError: no layer of the model becomes FP8 in any row.
        QualityError: LPIPS is asked for and cannot be measured, or ``call`` holds what differs by picture; see
            `quality.generate`.
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
        "options": to_jsonable(variants.settings),
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
        progress(f"{number}/{len(choices)} {name}: compiling, generating pictures")
        rows[name] = AblationRow(name, patterns)
        try:
            variants.use_everywhere(patterns)
            samples = variants.generate(prompts, seeds, **call)
            if len(samples[0].latents) < 2:
                raise AblationError(ONE_STEP)
            reports = variants.reports(patterns).values()
            totals = [r.totals for r in reports]
            before = "bytes_before" if patterns is BF16 else "bytes_after"
            if patterns is not BF16:
                reasons |= {row.reason for r in reports for row in r.layers}
            rows[name] = replace(
                rows[name],
                fp8_layers=sum(t["quantized"] for t in totals),
                fp8_attentions=sum(row.decision == "fp8" for r in reports for row in r.attentions),
                weight_bytes=sum(t[before] for t in totals),
                samples=samples,
                quality=None if patterns is BF16 else compare(rows[BASELINE].samples, samples, perceptual),
                prompt_adherence=_prompt_adherence(samples),
            )
        except Exception as error:  # whatever it is, the other rows are worth having
            failed(rows[name], error)
        so_far()
    failures = [f"{row.name}: {row.failure}" for row in rows.values() if row.failure]
    if len(failures) == len(groups):
        raise AblationError(f"every group failed: {'; '.join(failures)}")
    if not any(row.fp8_layers for row in rows.values()):
        raise NothingConvertedError(f"no layer of the model was quantized: {'; '.join(sorted(reasons))}")
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
    """Refuse arguments that would otherwise fail only after minutes of work."""
    for what, given in (("groups", groups), ("prompts", prompts), ("seeds", seeds)):
        if not given:
            raise AblationError(f"{what}: expected at least one, got {given!r}")
    if isinstance(prompts, str):
        raise AblationError(f"expected a list of prompts, got {prompts!r}")
    for name, patterns in groups.items():
        if isinstance(patterns, str):
            raise AblationError(f"{name!r}: expected a list of patterns, got {patterns!r}")
    if not isinstance(rounds, numbers.Integral) or isinstance(rounds, bool) or rounds < 1:
        raise AblationError(f"rounds: expected an integer of at least 1, got {rounds!r}")
    if call.get("num_inference_steps") == 1:
        raise AblationError(ONE_STEP)
    if BASELINE in groups:
        raise AblationError(f"{BASELINE!r} is the name of the unquantized row; give the group another name")
    trees = [Tree(model) for model in variants.denoisers.values()]
    within = [name for region in variants.regions for name in Tree(region.module).names]
    known = list(dict.fromkeys([*within, *(name for tree in trees for name in tree.names)]))
    if variants.fp8_attention:
        known += [name for tree in trees for name in tree.attentions]
    for name, patterns in groups.items():
        for pattern in patterns:
            if not any(first_match([pattern], path) for path in known):
                check_unmatched(pattern, known)
                raise AblationError(
                    f"{name!r}: {pattern!r} matches none of the layers {', '.join(dict.fromkeys(within))}"
                )


def _start_of_peak(variants: Variants) -> int | None:
    device = torch.device(variants.pipeline.device)
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _prompt_adherence(samples: Sequence[Sample]) -> dict[str, tuple[int, int]] | None:
    try:
        return prompt_adherence(samples)
    except SceneError:
        return None
