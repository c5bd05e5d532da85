"""``fp8-diffusion compile``: what `serve` compiles at start-up, saved for its next ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import ModelArgument, with_options
from .engine_settings import EngineSettings, parse_sizes
from .messages import errors_as_messages, require, tell


@with_options
@errors_as_messages()
def compile(
    settings: EngineSettings,
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the compiled code, for serve --compile-cache.")],
    model: ModelArgument = "embedded:qwen-image",
    sizes: Annotated[
        list[str] | None, typer.Option(help="As those of serve, which are drawn first without --warmup.")
    ] = None,
) -> None:
    """Compile as serve does with the same options, and save the result."""
    require("pydantic", "prometheus_client")

    from ..inductor import saved_cache
    from ..serve.engine import Engine

    load = settings.loader(context, model)
    warmup = parse_sizes("--warmup", settings.warmup) or parse_sizes("--sizes", sizes)
    engine = Engine(
        load, warmup, settings.max_batch, on_progress=lambda done, total, what: tell(f"{done} of {total}: {what}")
    )
    engine.start().result()
    engine.close(0)
    size = saved_cache.save(output, engine.session.device)
    typer.echo(f"{size / 2**20:.1f} MiB of compiled code are in {output}; use it with: serve --compile-cache {output}")
