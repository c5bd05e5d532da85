"""The command line, ``fp8-diffusion``."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from ..measure.search import Bound
    from ..pipelines.step_clock import StepClock
    from ..report import Report

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed; the command line needs: pip install 'fp8-compile[cli]'")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

PREFIX = "embedded:"
"""Of ``--model``, before the name of a pipeline that comes with the package."""
DEFAULT_MODEL = f"{PREFIX}qwen-image"

# What is measured by default. As long as each other for most tokenizers, so that one graph serves both.
PROMPTS = ("a large red circle on a white background", "two small blue squares on a yellow background")
SEEDS = (0, 1)

LEAST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1
"""That a generator of torch takes."""

Model = Annotated[
    str,
    typer.Option(
        help="Directory or hub name of a diffusers pipeline, or a small one of the package: embedded:qwen-image, "
        "embedded:z-image."
    ),
]
Quantization = Annotated[str, typer.Option(help="Method of quantization.")]
Granularity = Annotated[str, typer.Option(help="Scales: one per row, or one per tensor.")]
SmallM = Annotated[str, typer.Option(help="Layers that see few rows: weight-only, or keep.")]
InnerBackend = Annotated[str, typer.Option(help="What compiles the rewritten graph, and the BF16 twin.")]
CompileMode = Annotated[str | None, typer.Option(help="The mode of torch.compile, for example max-autotune.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Height = Annotated[int | None, typer.Option(min=16, help="In pixels.")]
Width = Annotated[int | None, typer.Option(min=16, help="In pixels.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What the picture should not show; needs guidance.")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="The pipeline's guidance_scale; 0 for Z-Image-Turbo, 1 for most to draw without.")
]
TrueCfgScale = Annotated[
    float | None, typer.Option(help="The pipeline's true_cfg_scale: classifier-free guidance of Qwen-Image and others.")
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]
Whole = Annotated[
    bool, typer.Option("--whole", help="Compile the whole transformer at once instead of block by block.")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="What the pictures show; repeat it.")]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", min=LEAST_SEED, max=LARGEST_SEED, help="Of the initial noise; repeat it.")
]


@app.callback()
def _commands() -> None:
    """FP8 inference for diffusion transformers."""


@app.command()
def text_to_image(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("out.png"),
    model: Model = DEFAULT_MODEL,
    quantization: Quantization = "fp8",
    no_quantization: Annotated[
        bool, typer.Option("--no-quantization", help="The unquantized twin: same compilation, weights as they are.")
    ] = False,
    ignored_layers: Annotated[
        list[str] | None, typer.Option(help="Layers that stay as they are; repeat it, or separate patterns by commas.")
    ] = None,
    granularity: Granularity = "row",
    small_m: SmallM = "weight-only",
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=LEAST_SEED, max=LARGEST_SEED, help="Of the initial noise.")] = 0,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    guidance_scale: GuidanceScale = None,
    true_cfg_scale: TrueCfgScale = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    inner_backend: InnerBackend = "inductor",
    compile_mode: CompileMode = None,
    whole: Whole = False,
    show_layers: Annotated[bool, typer.Option("--show-layers", help="End with the decision on every layer.")] = False,
) -> None:
    """Draw one picture from a text."""
    for name in ("quantization", "ignored_layers", "granularity", "small_m", "show_layers") if no_quantization else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            _fail(f"--{name.replace('_', '-')} and --no-quantization exclude each other; leave one out")
    _check_output(output)

    device, torch_dtype = _device(device), _dtype(dtype, quantized=not no_quantization)

    import torch

    from .. import NothingConvertedError, report
    from ..pipelines.denoisers import denoisers_of, has_fp8_weights, mark_steps
    from ..pipelines.step_clock import StepClock
    from ..recipes import RECOMMENDED

    patterns = [p.strip() for item in ignored_layers or [] if item.strip() for p in item.split(",")]
    options = _options(
        method=quantization,
        ignored_layers=patterns,
        granularity=granularity,
        small_m=small_m,
        inner_backend=inner_backend,
        mode=compile_mode,
    )
    pipe = _load(model, torch_dtype, device)
    call = _call(
        model,
        pipe,
        prompt=prompt,
        num_inference_steps=steps,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
    )
    with _errors():
        denoisers = denoisers_of(pipe)
        for name, module in denoisers.items():
            if no_quantization and has_fp8_weights(module):
                _fail(f"--no-quantization: the {name} of --model {model!r} has FP8 weights; give one in {dtype}")
            if compile_mode is not None and _by_block(module, whole):
                mark_steps([module])  # for the modes with CUDA graphs
            advice = RECOMMENDED.get(type(module).__name__)
            if advice and not patterns and not no_quantization and _embedded(model) is None:
                _tell(
                    f"{type(module).__name__}: others keep {', '.join(advice)} (--ignored-layers; see docs/models.md)"
                )
            if no_quantization:
                _compile(module, whole, backend=inner_backend, mode=compile_mode)
            else:
                _compile(module, whole, backend="fp8_diffusion", options=options)
        with StepClock(device) as clock:
            image = pipe(
                **call,
                generator=torch.Generator("cpu").manual_seed(seed),
                **_call_arguments(pipe, callback_on_step_end=clock.step),
            ).images[0]
        reports = {} if no_quantization else {name: report(module) for name, module in denoisers.items()}
        if reports and not any(r.totals["fp8"] for r in reports.values()):
            reasons = sorted({row.reason for r in reports.values() for row in r.layers})
            raise NothingConvertedError(f"no layer of the model became FP8: {'; '.join(reasons)}")
    image.save(output)
    _summarize(output, reports, clock, show_layers)


@app.command()
def ablate(
    model: Model = DEFAULT_MODEL,
    groups: Annotated[
        Path | None,
        typer.Option(
            help="JSON or TOML file: names, and lists of layers that stay in BF16. Default: 13 choices for Qwen-Image; "
            "for other models, each part of a block in turn."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for ablation.md, .json and .html.")] = Path("ablation"),
    prompt: Prompts = None,
    seed: Seeds = None,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    guidance_scale: GuidanceScale = None,
    true_cfg_scale: TrueCfgScale = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pictures that are timed for each choice, in turn.")] = 3,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of each choice on the page.")] = 2,
    lpips: Annotated[bool, typer.Option("--lpips", help="Measure LPIPS too; its weights must be there.")] = False,
    quantization: Quantization = "fp8",
    granularity: Granularity = "row",
    small_m: SmallM = "weight-only",
    inner_backend: InnerBackend = "inductor",
    compile_mode: CompileMode = None,
    whole: Whole = False,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Compare choices of layers that stay in BF16: time, memory, and quality against compiled BF16."""
    from ..measure import ablation_page
    from ..measure.ablate import ONE_STEP
    from ..measure.ablate import ablate as measure
    from ..measure.groups import groups_for, read_groups
    from ..measure.variants import Variants

    _check_folder(output, "ablation")
    if steps == 1:
        _fail(f"--steps 1: {ONE_STEP}")
    device, torch_dtype = _device(device), _dtype(dtype, quantized=True)
    options = _options(
        method=quantization,
        granularity=granularity,
        small_m=small_m,
        inner_backend=inner_backend,
        mode=compile_mode,
    )
    with _errors():
        chosen = None if groups is None else read_groups(groups)
    pipe = _measured(model, torch_dtype, device)
    call = _call(
        model,
        pipe,
        num_inference_steps=steps,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
    )
    with _errors():
        variants = Variants(pipe, options, whole)
        if chosen is None:
            chosen = groups_for(next(iter(variants.denoisers.values())))
        found = measure(
            variants,
            chosen,
            prompt or PROMPTS,
            seed or SEEDS,
            rounds,
            lpips,
            progress=_tell,
            written=output / "ablation.json",
            **call,
        )
    # The table first: it is what was asked for, and the page may still fail.
    typer.echo(ablation_page.markdown(found))
    (output / "ablation.md").write_text(ablation_page.markdown(found), encoding="utf-8")
    (output / "ablation.html").write_text(ablation_page.html(found, pictures), encoding="utf-8")
    typer.echo(f"wrote {output / 'ablation'}.{{md,json,html}}")


@app.command()
def search(
    model: Model = DEFAULT_MODEL,
    max_loss: Annotated[
        float | None, typer.Option(help="Bound for a metric that is 0 for equal pictures: relative_l2, lpips.")
    ] = None,
    min_quality: Annotated[
        float | None,
        typer.Option(help="Bound for a metric that grows with quality: psnr (in dB), ssim, cosine (1 for equal ones)."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="relative_l2 and cosine of the last latents, psnr, ssim, lpips.")
    ] = "relative_l2",
    statistic: Annotated[str, typer.Option(help="The bound is for the worst picture, or for the mean.")] = "worst",
    by: Annotated[
        str,
        typer.Option(
            help="Keep layers, the same in all blocks; blocks; or blocks-then-layers: single layers of these."
        ),
    ] = "layers",
    output: Annotated[
        Path, typer.Option(help="Folder for search.json and search.html. A search that is there goes on.")
    ] = Path("search"),
    prompt: Prompts = None,
    seed: Seeds = None,
    steps: Steps = None,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    guidance_scale: GuidanceScale = None,
    true_cfg_scale: TrueCfgScale = None,
    quantization: Quantization = "fp8",
    granularity: Granularity = "row",
    small_m: SmallM = "weight-only",
    inner_backend: InnerBackend = "inductor",
    compile_mode: CompileMode = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
) -> None:
    """Find a small set of layers to keep in BF16 that meets a bound on quality, by measuring pictures."""
    from ..measure import search_page
    from ..measure.search import BY, Search
    from ..measure.variants import Variants

    bound = _bound(metric, max_loss, min_quality, statistic)
    if by not in BY:
        _fail(f"--by {by!r} is not valid; valid: {', '.join(BY)}")
    _check_folder(output, "search")
    device, torch_dtype = _device(device), _dtype(dtype, quantized=True)
    options = _options(
        method=quantization,
        granularity=granularity,
        small_m=small_m,
        inner_backend=inner_backend,
        mode=compile_mode,
    )
    pipe = _measured(model, torch_dtype, device)
    call = _call(
        model,
        pipe,
        num_inference_steps=steps,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
    )
    typer.echo(f"asked for: {bound}")
    with _errors():
        made = Search(
            Variants(pipe, options),
            bound,
            prompt or PROMPTS,
            seed or SEEDS,
            output / "search.json",
            progress=_tell,
            **call,
        )
        result = made.run(by)
    # The list first: it is what was asked for, and the page may still fail.
    typer.echo(
        f"{len(result.kept)} of {len(made.layers)} layers to keep, after {result.measurements} measurements; "
        f"{bound.metric} {bound.of(result.quality):.4f}"
    )
    typer.echo(search_page.paste(result))
    typer.echo(search_page.how_to_use(result))
    (output / "search.html").write_text(search_page.html(made, result), encoding="utf-8")
    typer.echo(f"wrote {output / 'search'}.{{json,html}}")


def _bound(metric: str, max_loss: float | None, min_quality: float | None, statistic: str) -> Bound:
    """The bound, given by the option that says in which direction the metric is better."""
    from ..measure.search import Bound, SearchError

    if (max_loss is None) == (min_quality is None):
        _fail("give --max-loss (for relative_l2, lpips) or --min-quality (for psnr, ssim, cosine), one of the two")
    value = max_loss if max_loss is not None else min_quality
    assert value is not None
    try:
        bound = Bound(metric, value, statistic)
    except SearchError as error:
        _fail(str(error))
    if bound.less_is_better and max_loss is None:
        _fail(f"--min-quality {value:g}: {metric} is less for better pictures; use --max-loss")
    if not bound.less_is_better and min_quality is None:
        _fail(f"--max-loss {value:g}: {metric} is greater for better pictures; use --min-quality")
    return bound


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(1)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """End with the message of an error of this package, also of one that arose while a graph was compiled.

    What a pipeline says of the arguments of its call, such as a size, is the message too.
    """
    import torch

    from ..errors import Fp8Error

    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Fp8Error):
            raise
        _fail(str(error.inner_exception))
    except Fp8Error as error:
        _fail(str(error))
    except ValueError as error:
        *_, raised = traceback.walk_tb(error.__traceback__)
        if raised[0].f_code.co_name not in ("__call__", "check_inputs"):
            raise
        _fail(str(error))


def _options(**options: Any) -> dict[str, Any]:
    """``options``, of which none is invalid."""
    from ..checks import parse_options

    with _errors():
        parse_options(options)
    return options


def _device(device: str | None) -> str:
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(dtype: str, quantized: bool) -> torch.dtype:
    import torch

    valid = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in valid:
        _fail(f"--dtype {dtype!r} is not valid; valid: {', '.join(valid)}")
    if dtype == "float32" and quantized:
        _fail("--dtype float32: FP8 takes the place of bfloat16 and float16 weights; use one of those")
    return valid[dtype]


def _measured(model: str, dtype: torch.dtype, device: str) -> Any:
    """A pipeline to be measured, which tells of no steps. What measuring needs is asked for first."""
    try:
        import scipy  # type: ignore[import-untyped] # noqa: F401
        import skimage  # noqa: F401
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; measuring needs: pip install 'fp8-compile[cli,quality]'")
    pipe = _load(model, dtype, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embedded(model: str) -> str | None:
    """The name of the embedded pipeline that ``--model`` asks for, or None."""
    return model.removeprefix(PREFIX) if model.startswith(PREFIX) else None


def _call(model: str, pipe: Any, **given: Any) -> dict[str, Any]:
    """Arguments of the pipeline as given; the embedded pipelines' own where they are drawn with and nothing is."""
    from ..embedded import EMBEDDED_CALLS

    own = dict(EMBEDDED_CALLS.get(_embedded(model) or "", {}))
    given = {name: value for name, value in given.items() if value is not None}
    if "negative_prompt" in given:
        for scale in ("true_cfg_scale", "guidance_scale"):  # these switch guidance off, which would ignore it
            own.pop(scale, None)
    made = _call_arguments(pipe, **{**own, **given})
    _check_guidance(pipe, given)
    return made


def _check_guidance(pipe: Any, given: dict[str, Any]) -> None:
    """Refuse what pipelines ignore without an error."""
    true_cfg, guidance = given.get("true_cfg_scale"), given.get("guidance_scale")
    for name, value in (("--true-cfg-scale", true_cfg), ("--guidance-scale", guidance)):
        if value is not None and not math.isfinite(value):
            _fail(f"{name} {value}: a number belongs here")
    if "negative_prompt" in given:
        if true_cfg is not None and true_cfg <= 1:
            _fail(f"--true-cfg-scale {true_cfg:g} is no guidance, and --negative-prompt needs some; leave one out")
        if guidance is not None and guidance <= 0:
            _fail(f"--guidance-scale {guidance:g} is no guidance, and --negative-prompt needs some; leave one out")
    elif true_cfg is not None and true_cfg > 1:
        _fail(f"--true-cfg-scale {true_cfg:g} needs a --negative-prompt, if only ' '")
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    if guidance is not None and guidance > 1 and getattr(config, "guidance_embeds", None) is False:
        _fail(f"--guidance-scale {guidance:g}: this {type(pipe.transformer).__name__} takes none (no guidance_embeds)")


def _check_output(output: Path) -> None:
    """Refuse before any work what could not be written after all of it."""
    from PIL import Image

    valid = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if output.suffix.lower() not in valid:
        _fail(f"--output {str(output)!r}: no picture format ends in {output.suffix!r}; use for example .png or .jpg")
    if not output.parent.is_dir():
        _fail(f"--output {str(output)!r}: there is no directory {str(output.parent)!r}")


def _check_folder(output: Path, name: str) -> None:
    """As `_check_output`, of a folder for several files of this name."""
    from ..measure.results import check_writable

    for kind in ("json", "html", "md"):
        try:
            check_writable(output / f"{name}.{kind}")
        except OSError as error:
            _fail(f"--output {str(output)!r} cannot be written: {error}")


def _load(model: str, dtype: torch.dtype, device: str) -> Any:
    import diffusers

    from ..embedded import default_pipeline_dir
    from ..errors import OptionError

    loader: Any = diffusers.DiffusionPipeline
    embedded = _embedded(model)
    try:
        # As text: not every release of diffusers takes a Path.
        source = model if embedded is None else str(default_pipeline_dir(embedded))
        return loader.from_pretrained(source, dtype=dtype).to(device)
    except OptionError as error:
        _fail(f"--model {model!r}: {error}")
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: of a device that is not there
        _fail(f"--model {model!r} could not be loaded on --device {device}: {error}")


def _call_arguments(pipe: Any, **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that are set, if the pipeline takes them."""
    accepted = inspect.signature(pipe.__call__).parameters
    given = {name: value for name, value in arguments.items() if value is not None}
    optional = {"callback_on_step_end"}
    for name in sorted(given.keys() - accepted.keys() - optional):
        _fail(f"{type(pipe).__name__} takes no {name}; it takes {', '.join(accepted)}")
    return {name: value for name, value in given.items() if name in accepted}


def _compile(module: Any, whole: bool, **arguments: Any) -> None:
    if _by_block(module, whole):
        module.compile_repeated_blocks(fullgraph=True, **arguments)
    else:
        module.compile(fullgraph=True, **arguments)


def _by_block(module: Any, whole: bool) -> bool:
    """Block by block where the model names its blocks: compiled once, run by all of them."""
    return not whole and bool(getattr(module, "_repeated_blocks", None))


def _summarize(output: Path, reports: dict[str, Report], clock: StepClock, show_layers: bool) -> None:
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
