"""``fp8-diffusion inspect``: what would become FP8, and what memory that takes, without loading weights."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..patterns import folded
from .arguments import OUTPUT, CompileSettings, IgnoredLayers, ModelArgument, parse_patterns, with_options
from .messages import errors_as_messages, fail, require

if TYPE_CHECKING:
    from ..pipelines.inspection import DenoiserPlan, Inspection

KERNELS = {
    "fp8": (
        ("Ada, Hopper, Blackwell (8.9 and up)", "FP8 matmuls; where the library refuses scales per row, these follow"),
        ("Ampere (8.0, 8.6)", "FP8 weights, multiplied in BF16: memory, and no time"),
    ),
    "int8": (("Ampere and later (8.0 and up)", "INT8 matmuls"),),
}
"""By method, generations of NVIDIA GPUs with their compute capability, and what runs there."""

WAYS = {
    "files": "as in the files",
    "unquantized": "--no-quantization",
    "compile": "--load compile: BF16, and FP8 beside it",
    "fp8": "--load fp8: FP8, and one layer",
}


@with_options
@errors_as_messages()
def inspect(
    settings: CompileSettings,
    model: ModelArgument = "embedded:qwen-image",
    ignored_layers: IgnoredLayers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Tell what would become FP8, and the memory for it. Loads no weights."""
    require("diffusers", extra="cli")
    from ..pipelines.inspection import inspect_pipeline
    from .progress import hush_libraries

    if settings.attention is not None:
        fail("--attention: weights do not tell what computes attention; the report of a compiled model does")
    hush_libraries()
    patterns, chosen = parse_patterns(ignored_layers)
    options = settings.options(patterns)
    if chosen:
        options["ignored_layers"] = patterns
    found = inspect_pipeline(model, options, settings.dtype)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(found), "peaks": found.peaks()}, indent=1))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for plan in found.denoisers:
        _show(console, plan)
    table = Table("weights on the device at the most", "", title_justify="left", box=None)
    for way, size in found.peaks().items():
        table.add_row(WAYS[way], f"{size / 1e6:,.1f} MB")
    console.print(table)
    console.print(_others(found))
    for cards, kernels in KERNELS.get(settings.quantization or "fp8", ()):
        console.print(f"{cards}: {kernels}")


def _show(console: Console, plan: DenoiserPlan) -> None:
    before, after = plan.bytes_before / 1e6, plan.bytes_after / 1e6
    are = "are quantized in its files already" if plan.in_files else "would be quantized"
    console.print(
        f"{plan.name} ({plan.kind}): {plan.quantized} of {len(plan.layers)} linears {are}, {before:,.1f} MB -> "
        f"{after:,.1f} MB"
    )
    keep = ", ".join(plan.recommended) or "nothing"
    console.print(f"recommended to keep: {keep} ({plan.source})")
    reasons: dict[str, list[str]] = {}
    for row in plan.layers:
        if row.decision != "quantized":
            reason = "unquantized in the files" if plan.in_files else row.reason
            reasons.setdefault(reason, []).append(row.path)
    for reason, paths in reasons.items():
        console.print(f"  stay: {', '.join(folded(paths))}: {reason}")


def _others(found: Inspection) -> str:
    if not found.others:
        return "(without text encoders and VAE: the model is not on this disk)"
    return "(with " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in found.others.items()) + ")"
