"""The command line, ``fp8-diffusion``."""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from .report import Report

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed; the command line needs: pip install 'fp8-compile[cli]'")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

# What a pipeline calls the modules that run at every step.
DENOISERS = ("transformer", "transformer_2", "unet")

# The embedded default was trained on pictures of this size; other pipelines know their own.
EMBEDDED_SIZE = 64
EMBEDDED_STEPS = 8


@app.callback()
def _commands() -> None:
    """FP8 inference for diffusion transformers."""


@app.command()
def text_to_image(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out.png"),
    model: Annotated[
        str | None, typer.Option(help="Directory or hub name of a diffusers pipeline. Default: a small embedded one.")
    ] = None,
    quantization: Annotated[str, typer.Option(help="Method of quantization.")] = "fp8",
    no_quantization: Annotated[
        bool, typer.Option("--no-quantization", help="The unquantized twin: same compilation, weights as they are.")
    ] = False,
    ignored_layers: Annotated[
        list[str] | None, typer.Option(help="Layers that stay as they are; repeat it, or separate patterns by commas.")
    ] = None,
    granularity: Annotated[str, typer.Option(help="Scales: one per row, or one per tensor.")] = "row",
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    height: Annotated[int | None, typer.Option(min=8, help="In pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=8, help="In pixels.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    compile_mode: Annotated[
        str | None, typer.Option(help="The mode of torch.compile, for example max-autotune.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Compile the whole transformer at once instead of block by block.")
    ] = False,
    show_layers: Annotated[bool, typer.Option("--show-layers", help="End with the decision on every layer.")] = False,
) -> None:
    """Draw one picture from a text."""
    given_quantization = context.get_parameter_source("quantization")
    if no_quantization and given_quantization is not None and given_quantization.name == "COMMANDLINE":
        _fail("--quantization and --no-quantization exclude each other; leave one out")
    _check_output(output)

    import torch

    torch_dtype = getattr(torch, dtype, None)
    if torch_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        _fail(f"--dtype {dtype!r} is not valid; valid: bfloat16, float16, float32")
    if torch_dtype == torch.float32 and not no_quantization:
        _fail("--dtype float32: FP8 takes the place of bfloat16 and float16 weights; use one of those")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"

    from . import NothingConvertedError, report
    from .errors import Fp8Error
    from .options import Fp8Options

    patterns = [p.strip() for item in ignored_layers or [] for p in item.split(",") if p.strip()]
    try:
        options = {"method": quantization, "ignored_layers": patterns, "granularity": granularity, "mode": compile_mode}
        Fp8Options.parse(options)
    except Fp8Error as error:
        _fail(str(error))

    pipe = _load(model, torch_dtype, device)
    arguments = _call_arguments(
        pipe,
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=steps or (EMBEDDED_STEPS if model is None else None),
        height=height or (EMBEDDED_SIZE if model is None else None),
        width=width or (EMBEDDED_SIZE if model is None else None),
    )
    denoisers = {name: module for name in DENOISERS if (module := getattr(pipe, name, None)) is not None}
    if not denoisers:
        _fail(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}: nothing to compile")
    for module in denoisers.values():
        if no_quantization:
            _compile(module, whole, mode=compile_mode)
        else:
            _compile(module, whole, backend="fp8_diffusion", options=options)

    clock = _StepClock(device)
    try:
        with clock:
            image = pipe(
                **arguments,
                generator=torch.Generator("cpu").manual_seed(seed),
                **_call_arguments(pipe, callback_on_step_end=clock.step),
            ).images[0]
        reports = {} if no_quantization else {name: report(module) for name, module in denoisers.items()}
        if reports and not any(r.totals["fp8"] for r in reports.values()):
            reasons = sorted({row.reason for r in reports.values() for row in r.layers})
            raise NothingConvertedError(f"no layer of the model became FP8: {'; '.join(reasons)}")
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Fp8Error):
            raise
        _fail(str(error.inner_exception))
    except Fp8Error as error:
        _fail(str(error))
    image.save(output)
    _summarize(output, reports, clock, show_layers)


def _fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(1)


def _check_output(output: Path) -> None:
    """Refuse before any work what could not be written after all of it."""
    from PIL import Image

    valid = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if output.suffix.lower() not in valid:
        _fail(f"--output {str(output)!r}: no picture format ends in {output.suffix!r}; use for example .png or .jpg")
    if not output.parent.is_dir():
        _fail(f"--output {str(output)!r}: there is no directory {str(output.parent)!r}")


def _load(model: str | None, dtype: torch.dtype, device: str) -> Any:
    import diffusers

    from .tiny import default_pipeline_dir

    source = default_pipeline_dir() if model is None else model
    loader: Any = diffusers.DiffusionPipeline
    try:
        return loader.from_pretrained(source, dtype=dtype).to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: of a device that is not there
        _fail(f"--model {str(source)!r} could not be loaded on --device {device}: {error}")


def _call_arguments(pipe: Any, **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that are set, if the pipeline takes them."""
    accepted = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in arguments.items() if value is not None}
    optional = {"callback_on_step_end"}
    for name in sorted(given.keys() - accepted.keys() - optional):
        _fail(f"{type(pipe).__name__} takes no {name}; it takes {', '.join(accepted)}")
    return {name: value for name, value in given.items() if name in accepted}


def _compile(module: Any, whole: bool, **arguments: Any) -> None:
    # Block by block where the model names its blocks: compiled once, run by all of them.
    if whole or not getattr(module, "_repeated_blocks", None):
        module.compile(fullgraph=True, **arguments)
    else:
        module.compile_repeated_blocks(fullgraph=True, **arguments)


class _StepClock:
    """Times the steps of a pipeline, and apart from them what torch.compile took."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._step_ends: list[tuple[float, float]] = []
        self.compile_seconds = 0.0
        self._compile_start = 0.0

    def __enter__(self) -> _StepClock:
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._compile_started)
        callback_handler.register_end_callback(self._compile_ended)
        return self

    def __exit__(self, *_: object) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._compile_started)
        callback_handler.remove_end_callback(self._compile_ended)

    def _compile_started(self, _: Any) -> None:
        self._compile_start = time.perf_counter()

    def _compile_ended(self, _: Any) -> None:
        self.compile_seconds += time.perf_counter() - self._compile_start

    def step(self, pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A pipeline's ``callback_on_step_end``."""
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        self._step_ends.append((time.perf_counter(), self.compile_seconds))
        return kwargs

    @property
    def seconds_per_step(self) -> float | None:
        """Median over all steps but the first, whose start is unknown; compilation is not counted."""
        pairs = list(zip(self._step_ends, self._step_ends[1:], strict=False))
        times = [(end - compiled) - (start - before) for (start, before), (end, compiled) in pairs]
        return statistics.median(times) if times else None


def _summarize(output: Path, reports: dict[str, Report], clock: _StepClock, show_layers: bool) -> None:
    for name, found in reports.items():
        totals = found.totals
        if show_layers:
            typer.echo(f"{name}:\n{found}")
        typer.echo(
            f"{name}: {totals['fp8']} layers in FP8, {totals['kept']} kept; "
            f"weights {totals['bytes_before'] / 1e6:.1f} MB -> {totals['bytes_after'] / 1e6:.1f} MB"
        )
        for pattern in found.unmatched_patterns:
            typer.secho(f"{name}: ignored_layers {pattern!r} matched nothing", fg="yellow")
    if not reports:
        typer.echo("unquantized")
    per_step = clock.seconds_per_step
    steps = "not measured (needs two steps or more)" if per_step is None else f"{per_step:.3f} s per step"
    typer.echo(f"compiling {clock.compile_seconds:.1f} s, {steps}")
    typer.echo(f"wrote {output}")


def main() -> None:
    """Entry point of the command."""
    app()
