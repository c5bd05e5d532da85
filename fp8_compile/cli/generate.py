"""``fp8-diffusion generate``: pictures or videos from texts and pictures, and what was done for them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import AS_WRITTEN
from .arguments import (
    DRAW,
    LARGEST_SEED,
    LEAST_SEED,
    LOAD,
    OUTPUT,
    QUANTIZE,
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
    was_given,
    with_options,
)
from .engine_settings import check_additions, tell_additions
from .made_files import given_settings, names_of, plain, read_again, versions, write_picture, write_video
from .messages import check_file, errors_as_messages, fail, quiet, require, tell

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.session import Session
    from ..pipelines.step_clock import StepClock
    from ..report import Report

LOADING = ("compile", "fp8")


@dataclass(frozen=True)
class GenerateSettings(Settings):
    """Options that say what to draw and how."""

    prompts_file: Annotated[
        Path | None, typer.Option(help="A prompt in each line, instead of PROMPT.", rich_help_panel=DRAW)
    ] = None
    seed: Seed = 0
    num_images: Annotated[
        int, typer.Option(min=1, help="Of each prompt, with this seed and the next ones.", rich_help_panel=DRAW)
    ] = 1
    seeds: Annotated[
        str | None, typer.Option(help="Instead, such as 1,2,3: a picture with each.", rich_help_panel=DRAW)
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn together.", rich_help_panel=DRAW)] = 1
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A picture to edit or to begin with; repeat it where the model takes several.", rich_help_panel=DRAW
        ),
    ] = None
    strength: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="How much of --image to change, where it begins with it.", rich_help_panel=DRAW
        ),
    ] = None
    num_frames: Annotated[int | None, typer.Option(min=1, help="Of a video.", rich_help_panel=DRAW)] = None
    fps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Frames of a video in a second. Default: the pipeline's, or 16.", rich_help_panel=DRAW
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH[:WEIGHT]", help="A LoRA file, and how much of it; repeat it.", rich_help_panel=DRAW),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(help="One of diffusers', such as UniPCMultistep. Default: the model's.", rich_help_panel=DRAW),
    ] = None
    cache: Cache = None
    no_quantization: NoQuantization = False
    ignored_layers: IgnoredLayers = None
    activation_scales: Annotated[
        Path | None,
        typer.Option(help="Of static activations: a file that a calibration was saved to.", rich_help_panel=QUANTIZE),
    ] = None
    text_encoder_quantization: TextEncoderQuantization = None
    whole: Whole = False
    load: Annotated[
        str,
        typer.Option(
            help="compile: FP8 is made when the graphs are compiled, and BF16 stays in memory; fp8: while loading, a "
            "layer at a time, so that the device holds FP8 alone.",
            rich_help_panel=LOAD,
        ),
    ] = "compile"
    offload: Annotated[
        str | None,
        typer.Option(
            help="Weights wait in the CPU's memory: model, group or sequential, from fast to small.",
            rich_help_panel=LOAD,
        ),
    ] = None

    def prompts(self, context: typer.Context, prompt: str | None) -> list[str]:
        """What the pictures show."""
        if was_given(context, "prompts_file") and not was_given(context, "prompt"):
            prompt = None  # that of a file of settings, which the command line wins over
        if self.prompts_file is None:
            if prompt is None:
                fail("PROMPT is missing: give a text, --prompts-file, or --from a picture")
            return [prompt]
        if prompt is not None:
            fail("PROMPT and --prompts-file exclude each other; leave one out")
        try:
            lines = [line.strip() for line in self.prompts_file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeError) as error:
            fail(f"--prompts-file {self.prompts_file}: {error}")
        found = [line for line in lines if line]
        if not found:
            fail(f"--prompts-file {self.prompts_file} holds no prompts; expected one in each line")
        return found

    def all_seeds(self, context: typer.Context) -> list[int]:
        """Of the pictures of each prompt."""
        if self.seeds is None:
            if self.seed + self.num_images - 1 > LARGEST_SEED:
                fail(f"--seed {self.seed}: with --num-images {self.num_images}, the last is above {LARGEST_SEED}")
            return list(range(self.seed, self.seed + self.num_images))
        for name in ("seed", "num_images"):
            if was_given(context, name):
                fail(f"--seeds and --{name.replace('_', '-')} exclude each other; leave one out")
        try:
            found = [int(text) for text in self.seeds.split(",")]
        except ValueError:
            fail(f"--seeds {self.seeds!r}: expected numbers and commas, such as 1,2,3")
        for seed in found:
            if not LEAST_SEED <= seed <= LARGEST_SEED:
                fail(f"--seeds: {seed} is not from {LEAST_SEED} to {LARGEST_SEED}")
        return found

    def loras(self) -> list[tuple[str, Path, float]]:
        """Name, file and weight of each adapter."""
        found: list[tuple[str, Path, float]] = []
        for text in self.lora or ():
            path, weight = Path(text), 1.0
            head, colon, tail = text.rpartition(":")
            if colon and not path.is_file():
                try:
                    path, weight = Path(head), float(tail)
                except ValueError:
                    fail(f"--lora {text!r}: expected PATH or PATH:WEIGHT, such as style.safetensors:0.8")
            if not path.is_file():
                fail(f"--lora {text!r}: there is no file {str(path)!r}")
            if any(path == other for _, other, _ in found):
                fail(f"--lora {text!r}: this file is given twice")
            found.append((f"{len(found):02} {path.stem}", path, weight))
        if found:
            require("peft", extra="serve")
        return found

    def images(self) -> list[Image]:
        """Those that are edited."""
        if self.image is None:
            return []
        require("PIL", extra="quality")
        from PIL import Image, ImageOps

        found = []
        for path in self.image:
            try:
                with Image.open(path) as image:
                    found.append(ImageOps.exif_transpose(image).convert("RGB"))
            except OSError as error:
                fail(f"--image {path}: cannot be read as a picture: {error}")
        return found


@with_options
@errors_as_messages()
def generate(
    context: typer.Context,
    settings: GenerateSettings,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where it goes; several get numbers. Default: out.png, or out.mp4 of a video.", rich_help_panel=OUTPUT
        ),
    ] = None,
    again: Annotated[
        Path | None,
        typer.Option(
            "--from",
            callback=read_again,
            is_eager=True,
            help="A PNG file of this command: draw it again, but for what is given here.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a summary.", rich_help_panel=OUTPUT)
    ] = False,
    show_layers: Annotated[
        bool, typer.Option("--show-layers", help="End with the decision on every layer.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Draw pictures or videos from a text: also from pictures (--image), if the model does that."""
    if settings.no_quantization:
        check_no_quantization(context, (*QUANTIZING, "activation_scales", "show_layers"))
    if as_json and show_layers:
        fail("--json and --show-layers exclude each other: the object has the layers")
    jobs = [(text, seed) for text in settings.prompts(context, prompt) for seed in settings.all_seeds(context)]
    loras, images = settings.loras(), settings.images()
    patterns, chosen = parse_patterns(settings.ignored_layers)
    options = settings.options(patterns)
    _check_together(settings, images)
    require("diffusers", extra="cli")

    from ..pipelines.generation import generate as draw
    from ..pipelines.session import pipeline_class
    from ..pipelines.step_clock import StepClock
    from .progress import DrawingProgress, hush_libraries, loading

    kind = pipeline_class(settings.model)
    videos = None if kind is None else _makes_videos(kind)
    output = output or Path("out.mp4" if videos else "out.png")
    files = names_of(output, len(jobs))
    for file in files:
        check_file(file, videos)
    hush_libraries()
    start = time.perf_counter()
    with loading(settings.model):
        session = _load(settings, options, chosen, loras, images)
    arguments = _arguments(settings, session, images)
    videos = session.rules.makes_videos
    check_file(files[0], videos)
    if videos and settings.batch_size > 1:
        fail(f"--batch-size {settings.batch_size}: videos are drawn one by one")
    seconds = {"load": time.perf_counter() - start, "encode": 0.0, "denoise": 0.0, "decode": 0.0}
    made: list[dict[str, Any]] = []
    about = {"settings": _settings_of(context, settings), "versions": versions()}
    with DrawingProgress(len(jobs)) as progress, StepClock(session.device, progress.compiling) as clock:
        for at in range(0, len(jobs), settings.batch_size):
            batch = jobs[at : at + settings.batch_size]
            progress.picture(at + 1)
            given = {**arguments, "prompt": [text for text, _ in batch]}
            if "negative_prompt" in given:
                given["negative_prompt"] = [given["negative_prompt"]] * len(batch)
            found = draw(session, [seed for _, seed in batch], progress.step, clock.step, **given)
            for name, spent in found.seconds.items():
                seconds[name] += spent
            if at == 0 and not settings.no_quantization:
                session.reports()  # where nothing was quantized, no picture says that it was
            for (text, seed), pixels, file in zip(batch, found.pixels, files[at:], strict=False):
                if videos:
                    size = write_video(pixels, file, settings.fps or session.rules.usual_fps, found.sounds[0])
                else:
                    own = {**about["settings"], "prompt": text, "seed": seed}
                    size = write_picture(pixels, file, {**about, "settings": own, "device": session.device})
                made.append({"path": str(file), "prompt": text, "seed": seed, "width": size[0], "height": size[1]})
    reports = {} if settings.no_quantization else session.reports()
    seconds["compile"] = clock.compile_seconds
    if as_json:
        typer.echo(json.dumps(_object(made, about, seconds, session, reports, clock), indent=1))
    elif not quiet.get():
        _print_summary(reports, clock, show_layers)
        for file in files:
            typer.echo(f"wrote {file}")


def _check_together(settings: GenerateSettings, images: Sequence[Image]) -> None:
    """Refuse options that have no sense together, before anything is loaded."""
    if settings.load not in LOADING:
        fail(f"--load {settings.load!r} is not valid; valid: {', '.join(LOADING)}")
    if settings.load == "fp8" and settings.no_quantization:
        fail("--load fp8 and --no-quantization exclude each other; leave one out")
    if settings.load == "fp8" and settings.activation_scales is not None:
        fail("--load fp8 takes no --activation-scales; they are given when graphs are compiled (--load compile)")
    if settings.batch_size > 1 and settings.cache is not None:
        fail(f"--batch-size {settings.batch_size}: with --cache pictures are drawn one by one")
    if settings.batch_size > 1 and settings.attention not in (None, AS_WRITTEN):
        fail(f"--batch-size {settings.batch_size}: with --attention pictures are drawn one by one")
    if settings.batch_size > 1 and images:
        fail(f"--batch-size {settings.batch_size}: with --image pictures are drawn one by one")
    if settings.strength is not None and not images:
        fail("--strength needs --image")
    check_additions(settings.cache, settings.text_encoder_quantization)
    if settings.scheduler is not None:
        from ..pipelines.schedulers import scheduler_class

        scheduler_class(settings.scheduler)


def _makes_videos(kind: type) -> bool:
    import inspect

    return "num_frames" in inspect.signature(kind.__call__).parameters


def _load(
    settings: GenerateSettings,
    options: dict[str, Any],
    chosen: bool,
    loras: Sequence[tuple[str, Path, float]],
    images: Sequence[Image],
) -> Session:
    """The pipeline, compiled. ``chosen``: what stays as it is was given."""
    import torch

    from ..calibration import load_calibration
    from ..pipelines.adapters import Adapters
    from ..pipelines.schedulers import set_scheduler
    from ..pipelines.session import Session
    from .engine_settings import default_patterns

    quantized = not settings.no_quantization
    at_load = None
    if settings.load == "fp8":
        if not chosen and settings.layers is None:
            options |= {"ignored_layers": default_patterns(settings.model)}
        at_load = {**options, "strict": True}
    session = Session.load(
        settings.model,
        settings.dtype,
        settings.device,
        quantized=quantized,
        at_load=at_load,
        cache=settings.cache,
        text_encoders=settings.text_encoder_quantization,
        offloading=settings.offload,
    )
    tell_additions(session)
    session.pipe.set_progress_bar_config(disable=True)
    if chosen and at_load is None:
        _check_not_quantized(session, options.get("ignored_layers", []))
    if settings.scheduler is not None:
        set_scheduler(settings.scheduler, session.pipe)
    if images and not session.takes("image"):
        session = _from_image(session)
    if loras:
        adapters = Adapters(session.pipe, {name: path for name, path, _ in loras}, len(loras))
        adapters.use(tuple((name, weight) for name, _, weight in loras))
        session = dataclasses.replace(session, adapters=adapters)
    if settings.cache is not None:
        # A cache makes a graph for each state that it comes to; beyond the limit, blocks would run as written.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if not quantized:
        session.compile_unquantized(settings.inner_backend, settings.compile_mode, settings.whole)
        return session
    if at_load is None and not chosen and settings.layers is None:
        options |= _recommended(session)
    scales = None if settings.activation_scales is None else load_calibration(settings.activation_scales)
    session.compile(options, settings.whole, scales)
    return session


def _check_not_quantized(session: Session, patterns: Sequence[str]) -> None:
    """Refuse to keep what a checkpoint holds in FP8: it would be dequantized at each step, to no better a picture."""
    from ..patterns import Pattern
    from ..quantize import prequantized_in

    for denoiser, module in session.denoisers.items():
        paths = prequantized_in(module)
        for pattern in patterns:
            named = [path for path in paths if Pattern(pattern).matches(path)]
            if named:
                fail(
                    f"--ignored-layers {pattern}: {named[0]} of the {denoiser} is quantized in the checkpoint already "
                    f"({len(named)} layers are); they would be dequantized at every step, for no better picture. "
                    "Load the unquantized model"
                )


def _from_image(session: Session) -> Session:
    """The session with the pipeline of the same parts that begins with a picture."""
    import diffusers

    kind: Any = diffusers.AutoPipelineForImage2Image
    try:
        pipe = kind.from_pipe(session.pipe)
    except (ValueError, AttributeError) as error:
        fail(f"--image: {type(session.pipe).__name__} takes no picture, nor has diffusers a twin that does: {error}")
    pipe.set_progress_bar_config(disable=True)
    return dataclasses.replace(session, pipe=pipe)


def _arguments(settings: GenerateSettings, session: Session, images: Sequence[Image]) -> dict[str, Any]:
    """Arguments of all calls, but for what differs."""
    given = settings.call()
    if images:
        given |= {"image": images[0] if len(images) == 1 else list(images), "strength": settings.strength}
        if settings.height is None and settings.width is None and session.takes("strength"):
            multiple = session.pixel_multiple
            width, height = (max(multiple, side // multiple * multiple) for side in images[0].size)
            given |= {"height": height, "width": width}
    rules = session.rules
    if settings.fps is not None and not rules.makes_videos:
        fail(f"--fps {settings.fps} is for videos, and {rules.pipeline} draws pictures")
    rate = {} if rules.rate is None else {rules.rate: settings.fps}
    arguments = session.arguments(**given, num_frames=settings.num_frames, **rate)
    width, height = (arguments.get(side) or session.pixel_multiple for side in ("width", "height"))
    session.check_fits(width, height)
    missed = None if images else session.needs_a_picture("a", **arguments)
    if missed is not None:
        fail(f"{settings.model} needs a picture: --image ({type(session.pipe).__name__}: {missed})")
    return arguments


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


def _settings_of(context: typer.Context, settings: GenerateSettings) -> dict[str, Any]:
    """What makes a picture again, but for its prompt and seed: those that were given, and the model."""
    given = {name: plain(value) for name, value in given_settings(context).items()}
    return {"model": settings.model, **given}


def _object(
    made: list[dict[str, Any]],
    about: dict[str, Any],
    seconds: dict[str, float],
    session: Session,
    reports: dict[str, Report],
    clock: StepClock,
) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "files": made,
        **about,
        "device": session.device,
        "seconds": {**{name: round(spent, 3) for name, spent in seconds.items()}, "per_step": clock.seconds_per_step},
        "memory": _memory(session.device),
        "layers": {name: found.totals for name, found in reports.items()},
        "attentions": {
            name: dict(Counter(row.kernel or AS_WRITTEN for row in found.attentions)) for name, found in reports.items()
        },
    }


def _memory(device: str) -> dict[str, int]:
    """Bytes at the most, of the process and of a GPU."""
    import torch

    from .progress import peak_bytes

    found = {"process_peak": peak_bytes()}
    if torch.device(device).type == "cuda":
        found["gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return found


def _print_summary(reports: dict[str, Report], clock: StepClock, show_layers: bool) -> None:
    for name, found in reports.items():
        totals = found.totals
        if show_layers:
            typer.echo(f"{name}:\n{found}")
        both = ", both in memory" if totals["extra_bytes"] else ""
        typer.echo(
            f"{name}: {totals['quantized']} layers quantized, {totals['unquantized']} unquantized; weights read per "
            f"step {totals['bytes_before'] / 1e6:.1f} MB -> {totals['bytes_after'] / 1e6:.1f} MB{both}"
        )
        if found.attentions:
            computed = Counter(row.kernel for row in found.attentions if row.kernel)
            kernels = ", ".join(f"{count} by {kernel}" for kernel, count in computed.items()) or "none"
            typer.echo(f"{name}: of {len(found.attentions)} attentions in FP8: {kernels}")
        for pattern in found.unmatched_patterns:
            typer.secho(f"{name}: pattern {pattern!r} matched nothing", fg="yellow")
    if not reports:
        typer.echo("unquantized")
    per_step = clock.seconds_per_step
    steps = "not measured (needs two steps or more)" if per_step is None else f"{per_step:.3f} s per step"
    typer.echo(f"compiling {clock.compile_seconds:.1f} s, {steps}")
