"""``fp8-diffusion text-to-image``: one picture, and what was done for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import (
    QUANTIZING,
    Cache,
    IgnoredLayers,
    NoQuantization,
    Seed,
    Settings,
    TextEncoderQuantization,
    Whole,
    check_no_quantization,
    parse_patterns,
    with_options,
)
from .engine_settings import check_additions, tell_additions
from .messages import check_picture, errors_as_messages, fail, tell

if TYPE_CHECKING:
    from ..pipelines.session import Session
    from ..pipelines.step_clock import StepClock
    from ..report import Report


@with_options
@errors_as_messages()
def text_to_image(
    context: typer.Context,
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out.png"),
    seed: Seed = 0,
    no_quantization: NoQuantization = False,
    ignored_layers: IgnoredLayers = None,
    activation_scales: Annotated[
        Path | None, typer.Option(help="Of static activations: a file that a calibration was saved to.")
    ] = None,
    cache: Cache = None,
    text_encoder_quantization: TextEncoderQuantization = None,
    whole: Whole = False,
    show_layers: Annotated[bool, typer.Option("--show-layers", help="End with the decision on every layer.")] = False,
) -> None:
    """Draw one picture from a text."""
    if no_quantization:
        check_no_quantization(context, (*QUANTIZING, "activation_scales", "show_layers"))
    check_picture(output)

    from ..calibration import load_calibration
    from ..pipelines.session import Session
    from ..pipelines.step_clock import StepClock

    patterns, chosen = parse_patterns(ignored_layers)
    options = settings.options(patterns)
    check_additions(cache, text_encoder_quantization)
    session = Session.load(
        settings.model,
        settings.dtype,
        settings.device,
        quantized=not no_quantization,
        cache=cache,
        text_encoders=text_encoder_quantization,
    )
    if session.rules.makes_videos:
        fail(f"{settings.model} makes videos; fp8-diffusion serve answers requests for them")
    tell_additions(session)
    if cache is not None:
        import torch

        # A cache makes a graph for each state that it comes to; beyond the limit, blocks would run as written.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    arguments = session.arguments(prompt=prompt, **settings.call())
    if no_quantization:
        session.compile_unquantized(settings.inner_backend, settings.compile_mode, whole)
    else:
        if not chosen and settings.layers is None:
            options |= _recommended(session)
        session.compile(options, whole, None if activation_scales is None else load_calibration(activation_scales))
    with StepClock(session.device) as clock:
        image = session.call(seed, callback_on_step_end=clock.step, **arguments).images[0]
    reports = {} if no_quantization else session.reports()
    image.save(output)
    _print_summary(reports, clock, show_layers)
    typer.echo(f"wrote {output}")


def _recommended(session: Session) -> dict[str, Any]:
    """What is kept where nothing is said; none of a pipeline of the package, which was measured without."""
    from ..embedded import embedded_name
    from ..options import RECOMMENDED
    from ..pipelines.denoisers import has_fp8_weights
    from ..recipes import recipe_of, recommended

    denoisers = session.denoisers.values()
    if embedded_name(session.model) is not None or any(map(has_fp8_weights, denoisers)):
        return {}
    for module in {type(module): module for module in denoisers}.values():
        name, patterns = type(module).__name__, recommended(module)
        if recipe_of(module) is None and patterns:
            tell(f"{name}: keeps what is outside of its repeated blocks; --ignored-layers none converts everything")
        elif patterns:
            tell(f"{name}: keeps {', '.join(patterns)}, as others recommend; --ignored-layers none converts everything")
    return {"ignored_layers": [RECOMMENDED]} if any(map(recommended, denoisers)) else {}


def _print_summary(reports: dict[str, Report], clock: StepClock, show_layers: bool) -> None:
    for name, found in reports.items():
        totals = found.totals
        if show_layers:
            typer.echo(f"{name}:\n{found}")
        typer.echo(
            f"{name}: {totals['quantized']} layers quantized, {totals['unquantized']} unquantized; "
            f"weights {totals['bytes_before'] / 1e6:.1f} MB -> {totals['bytes_after'] / 1e6:.1f} MB"
        )
        for pattern in found.unmatched_patterns:
            typer.secho(f"{name}: pattern {pattern!r} matched nothing", fg="yellow")
    if not reports:
        typer.echo("unquantized")
    per_step = clock.seconds_per_step
    steps = "not measured (needs two steps or more)" if per_step is None else f"{per_step:.3f} s per step"
    typer.echo(f"compiling {clock.compile_seconds:.1f} s, {steps}")
