"""The options that commands share, each written down once."""

from __future__ import annotations

import functools
import inspect
import json
import re
import tomllib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import COMMON, GENERAL, set_verbosity
from .messages import fail

if TYPE_CHECKING:
    from ..pipelines.session import Session

# What is measured by default. Equal token counts for most tokenizers, so that both prompts share one compiled graph.
PROMPTS = ("a large red circle on a white background", "two small blue squares on a yellow background")
SEEDS = (0, 1)

LEAST_SEED, LARGEST_SEED = -(2**63), 2**64 - 1
"""The seeds that a generator of torch takes."""

PANELS = (DRAW, OUTPUT, QUANTIZE, COMPILE, LOAD, _) = (
    "What to draw",
    "Output",
    "Quantization",
    "Compilation",
    "Loading",
    GENERAL,
)
"""Panels of the help, in its order."""

Seed = Annotated[
    int, typer.Option(min=LEAST_SEED, max=LARGEST_SEED, help="Of the initial noise.", rich_help_panel=DRAW)
]
Whole = Annotated[
    bool,
    typer.Option(
        "--whole", help="Compile the whole transformer at once instead of block by block.", rich_help_panel=COMPILE
    ),
]


NoQuantization = Annotated[
    bool,
    typer.Option(
        "--no-quantization",
        help="The unquantized twin: same compilation, weights as they are.",
        rich_help_panel=QUANTIZE,
    ),
]
IgnoredLayers = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers that stay as they are; repeat it, or separate patterns by commas. Default: those of the "
        "model's recipe, if the weights are not quantized yet and --layers is not given; none: convert all.",
        rich_help_panel=QUANTIZE,
    ),
]


Cache = Annotated[
    str | None,
    typer.Option(
        help="A step cache of diffusers', with its defaults: first-block, pyramid, sea, taylorseer, "
        "taylorseer-lite or text-kv. "
        "Default: none.",
        rich_help_panel=DRAW,
    ),
]
TextEncoderQuantization = Annotated[
    str | None,
    typer.Option(
        help="Method for the weights of the text encoders, such as fp8, but for what their recipes keep. It saves "
        "memory, not time. Default: as they are.",
        rich_help_panel=QUANTIZE,
    ),
]


def parse_patterns(ignored_layers: Sequence[str] | None) -> tuple[list[str], bool]:
    """The patterns of ``--ignored-layers``, and whether it was given at all: "none" is a choice without patterns."""
    patterns = [p.strip() for item in ignored_layers or [] if item.strip() for p in _at_commas(item)]
    if "none" in patterns and len(patterns) > 1:
        fail("--ignored-layers none excludes other patterns; leave one out")
    return [p for p in patterns if p != "none"], bool(patterns)


def _at_commas(text: str) -> list[str]:
    """``text`` in parts. A comma in brackets belongs to a regular expression, such as ``re:x{1,2}``."""
    parts, depth, escaped = [""], 0, False
    for character in text:
        if character == "," and depth == 0 and not escaped:
            parts.append("")
            continue
        if not escaped:
            depth = max(0, depth + (character in "([{") - (character in ")]}"))
        escaped = character == "\\" and not escaped
        parts[-1] += character
    return parts


def was_given(context: typer.Context, name: str) -> bool:
    """Whether the option ``name`` stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def was_read(context: typer.Context, name: str) -> bool:
    """Whether the option ``name`` comes from a file of settings."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


QUANTIZING = (
    "quantization",
    "ignored_layers",
    "layers",
    "granularity",
    "small_m",
    "weight_block_size",
    "activation_scheme",
    "attention",
)
"""Options of commands that say how to quantize."""


def check_no_quantization(context: typer.Context, names: Sequence[str]) -> None:
    """Refuse options ``names`` of quantization beside ``--no-quantization``.

    If that stands on the line, it wins over what a file of settings says, and only the options of the line are refused.
    """
    on_the_line = was_given(context, "no_quantization")
    for name in names:
        if was_given(context, name) or (not on_the_line and was_read(context, name)):
            fail(f"--{name.replace('_', '-')} and --no-quantization exclude each other; leave one out")


MODEL_HELP = (
    "Directory or hub name of a diffusers pipeline, or a small one of fp8-compile-embedded: embedded:qwen-image, "
    "embedded:z-image."
)
ModelOption = Annotated[str, typer.Option(help=MODEL_HELP, rich_help_panel=LOAD)]
ModelArgument = Annotated[str, typer.Argument(metavar="[DIR_OR_ID]", help=MODEL_HELP)]


@dataclass(frozen=True)
class CompileSettings:
    """Options of every command: how the pipeline is loaded, quantized and compiled."""

    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=LOAD)] = "bfloat16"
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one, else cpu.", rich_help_panel=LOAD)
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Method of quantization. Default: fp8, or what the weights were quantized with.",
            rich_help_panel=QUANTIZE,
        ),
    ] = None
    granularity: Annotated[
        str | None,
        typer.Option(
            help="Scales: one per row, or one per tensor. Default: row, or what the weights have.",
            rich_help_panel=QUANTIZE,
        ),
    ] = None
    small_m: Annotated[
        str | None,
        typer.Option(help="Layers that see few rows: weight-only (default), or keep.", rich_help_panel=QUANTIZE),
    ] = None
    weight_block_size: Annotated[
        str | None,
        typer.Option(
            help="A scale for each block of a weight: 128x128 or 1x128. Default: one per row.", rich_help_panel=QUANTIZE
        ),
    ] = None
    activation_scheme: Annotated[
        str | None,
        typer.Option(
            help="Scales of activations: dynamic (default), static (calibrated), or none.", rich_help_panel=QUANTIZE
        ),
    ] = None
    attention: Annotated[
        str | None,
        typer.Option(
            help="as-written (default); fp8: where a kernel of the GPU takes it; or fp8-emulated: as slow as it is "
            "anywhere, to see what FP8 would lose.",
            rich_help_panel=QUANTIZE,
        ),
    ] = None
    layers: Annotated[
        Path | None,
        typer.Option(
            help="What holds for single layers: a JSON or TOML file, such as search writes.", rich_help_panel=QUANTIZE
        ),
    ] = None
    inner_backend: Annotated[
        str, typer.Option(help="What compiles the rewritten graph, and the BF16 twin.", rich_help_panel=COMPILE)
    ] = "inductor"
    compile_mode: Annotated[
        str | None, typer.Option(help="The mode of torch.compile, for example max-autotune.", rich_help_panel=COMPILE)
    ] = None

    def options(self, ignored_layers: Sequence[str] = ()) -> dict[str, Any]:
        """Those of the backend.

        Raises:
            OptionError: one is not valid.
            PatternError: an entry of ``ignored_layers`` is malformed.
        """
        from ..checks import parse_options

        # What is not given is left out: weights that are quantized already have options of their own.
        given = {
            "method": self.quantization,
            "granularity": self.granularity,
            "small_m": self.small_m,
            "weight_block_size": _block_size(self.weight_block_size),
            "activation_scheme": self.activation_scheme,
            "attention": self.attention,
            "layers": _plan(self.layers),
            "mode": self.compile_mode,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        options["inner_backend"] = self.inner_backend
        if ignored_layers:
            options["ignored_layers"] = list(ignored_layers)
        parse_options(options)
        return options


@dataclass(frozen=True)
class Settings(CompileSettings):
    """Options of every command that draws: which pipeline, and how it is called."""

    model: ModelOption = "embedded:qwen-image"
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", rich_help_panel=DRAW)] = None
    height: Annotated[int | None, typer.Option(min=16, help="In pixels.", rich_help_panel=DRAW)] = None
    width: Annotated[int | None, typer.Option(min=16, help="In pixels.", rich_help_panel=DRAW)] = None
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the picture should not show; needs guidance.", rich_help_panel=DRAW)
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="The pipeline's guidance_scale; 0 for Z-Image-Turbo, 1 for most to draw without.", rich_help_panel=DRAW
        ),
    ] = None
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(
            help="The pipeline's true_cfg_scale: classifier-free guidance of Qwen-Image and others.",
            rich_help_panel=DRAW,
        ),
    ] = None

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call by the names that diffusers gives them; None where not given."""
        return {
            "num_inference_steps": self.steps,
            "height": self.height,
            "width": self.width,
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance_scale,
            "true_cfg_scale": self.true_cfg_scale,
        }


@dataclass(frozen=True)
class MeasureSettings(Settings):
    """Options of every command that measures pictures of several prompts and seeds."""

    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What the pictures show; repeat it.", rich_help_panel=DRAW)
    ] = None
    seed: Annotated[
        list[int] | None,
        typer.Option(
            "--seed", min=LEAST_SEED, max=LARGEST_SEED, help="Of the initial noise; repeat it.", rich_help_panel=DRAW
        ),
    ] = None

    @property
    def prompts(self) -> Sequence[str]:
        return self.prompt or PROMPTS

    @property
    def seeds(self) -> Sequence[int]:
        return self.seed or SEEDS

    def load(self) -> tuple[Session, dict[str, Any]]:
        """The pipeline, without progress bars, and the arguments of its calls, which it has accepted."""
        try:  # measuring needs them, and loading takes long
            import scipy  # type: ignore[import-untyped] # noqa: F401
            import skimage  # noqa: F401
        except ModuleNotFoundError as error:
            fail(f"{error.name} is not installed; measuring needs: pip install 'fp8-compile[cli,quality]'")

        from ..pipelines.session import Session
        from .progress import hush_libraries, loading

        hush_libraries()
        with loading(self.model):
            session = Session.load(self.model, self.dtype, self.device)
        session.pipe.set_progress_bar_config(disable=True)
        call = session.arguments(**self.call())
        session.check_call(prompt=self.prompts[0], **call)
        return session, call


def _block_size(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        fail(f"--weight-block-size {text!r}: expected ROWSxCOLUMNS, for example 128x128")
    return [int(found[1]), int(found[2])]


def _plan(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        text = path.read_text("utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        fail(f"--layers {path}: cannot be read as {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}")


def _panel(annotation: Any) -> int:
    """The place of an option's panel in the help: of those without one, the first."""
    panel = typing.get_args(annotation)[1].rich_help_panel if typing.get_origin(annotation) is Annotated else None
    return PANELS.index(panel) + 1 if panel in PANELS else 0


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each field of the dataclass that its parameter ``settings`` is annotated with.

    And with those of `COMMON`, which are seen to here.
    """
    own = dict(inspect.signature(command, eval_str=True).parameters)
    settings = own.pop("settings").annotation
    names = [field.name for field in fields(settings)]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        set_verbosity(given.pop("quiet"), given.pop("verbose"))
        del given["config"]  # it has been read when the others were
        command(settings=settings(**{name: given.pop(name) for name in names}), **given)

    annotations = typing.get_type_hints(settings, include_extras=True)
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own.values()] + [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotations[field.name]
        )
        for field in fields(settings)
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in COMMON
    ]
    parameters.sort(key=lambda parameter: _panel(parameter.annotation))
    # What typer reads.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
