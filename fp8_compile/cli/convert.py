"""``fp8-diffusion convert``: a pipeline in FP8 on the disk, or a file for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import (
    OUTPUT,
    CompileSettings,
    IgnoredLayers,
    ModelArgument,
    TextEncoderQuantization,
    with_options,
)
from .engine_settings import check_additions, options_at_load, tell_additions, tell_kept
from .messages import errors_as_messages, fail, require, tell


@with_options
@errors_as_messages()
def convert(
    settings: CompileSettings,
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist.", rich_help_panel=OUTPUT)],
    model: ModelArgument = "embedded:qwen-image",
    format: Annotated[
        str,
        typer.Option(
            help="pipeline: all of it, as diffusers reads it; or the transformers alone, in a file each: fp8_compile, "
            "compressed-tensors, modelopt, comfyui.",
            rich_help_panel=OUTPUT,
        ),
    ] = "pipeline",
    ignored_layers: IgnoredLayers = None,
    text_encoder_quantization: TextEncoderQuantization = None,
) -> None:
    """Write a pipeline, or its transformers, in FP8."""
    require("diffusers", extra="cli")
    from ..integrations.checkpoints import save_fp8_checkpoint
    from ..integrations.formats import FORMATS
    from ..integrations.stored_weights import OWN
    from ..measure.results import check_writable
    from ..pipelines.session import Session
    from .progress import hush_libraries, loading

    formats = ("pipeline", OWN, *FORMATS)
    if format not in formats:
        fail(f"--format {format!r} is not valid; valid: {', '.join(formats)}")
    if format != "pipeline" and text_encoder_quantization is not None:
        fail(f"--format {format}: text encoders are not written; --text-encoder-quantization is for --format pipeline")
    if output.exists():
        fail(f"--output {str(output)!r} exists already")
    try:
        check_writable(output / "model_index.json")
    except OSError as error:
        fail(f"--output {str(output)!r} cannot be written: {error}")
    check_additions(None, text_encoder_quantization)
    options = options_at_load(settings, ignored_layers, model)
    if settings.attention is not None:
        fail("--attention belongs to compilation, and weights do not hold it; give it to the command that draws")
    if settings.activation_scheme == "static":
        fail("--activation-scheme static: this command takes no scales; calibrate and save in Python")
    hush_libraries()
    with loading(model):
        session = Session.load(
            model,
            settings.dtype,
            settings.device or "cpu",
            at_load={**options, "strict": True},
            text_encoders=text_encoder_quantization,
        )
    tell_additions(session)
    tell_kept(session)
    if format == "pipeline":
        session.pipe.save_pretrained(output)
    else:
        output.mkdir(parents=True)
        for name, module in session.denoisers.items():
            save_fp8_checkpoint(module, output / f"{name}.safetensors", format)
    for name, module in session.denoisers.items():
        size = sum(parameter.nbytes for parameter in module.parameters())
        tell(f"{name}: {session.weights} weights, {size / 1e6:.1f} MB")
    typer.echo(
        f"wrote {output}; draw with: fp8-diffusion generate --model {output} PROMPT"
        if format == "pipeline"
        else f"wrote {', '.join(str(output / f'{name}.safetensors') for name in session.denoisers)}"
    )
