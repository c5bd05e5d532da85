"""``fp8-diffusion batch``: the pictures of a file of requests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from .arguments import ModelOption, with_options
from .engine_settings import EngineSettings, parse_sizes, require
from .messages import errors_as_messages, fail, tell


@with_options
@errors_as_messages()
def batch(
    context: typer.Context,
    settings: EngineSettings,
    prompts: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="A JSON object in each line, with the fields of POST /v1/images/generations.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for pictures and manifest.jsonl.")],
    model: ModelOption = "embedded:qwen-image",
) -> None:
    """Draw a picture for each line of a file; what is in the folder's manifest is not drawn again."""
    require("pydantic", "prometheus_client", "starlette")

    from rich.console import Console
    from rich.progress import Progress

    from ..serve.admission import Admission, Limits
    from ..serve.batch import Line, Manifest, draw, lines_left
    from ..serve.engine import Engine
    from ..serve.painter_process import LOG_FORMAT

    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    try:
        manifest = Manifest(output)
        left, total = lines_left(prompts, manifest)
    except (OSError, UnicodeError) as error:
        fail(str(error))
    typer.echo(f"{total - len(left)} of {total} pictures are in {output / 'manifest.jsonl'}")
    if not left:
        return
    load, drawn_first = settings.loader(context, model), parse_sizes("--warmup", settings.warmup)
    bad = 0
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading", total=None)

        def on_progress(done: int, count: int, what: str) -> None:
            progress.update(bar, completed=done, total=count, description=f"warm-up: {what}")

        def on_done(line: Line, problem: str | None) -> None:
            nonlocal bad
            bad += problem is not None
            if problem is not None:
                tell(f"line {line.number}: {problem}")
            progress.advance(bar)

        engine = Engine(load, drawn_first, settings.max_batch, on_progress=on_progress)
        engine.start().result()
        usual = drawn_first[0] if drawn_first else None
        limits = Limits((), settings.max_pixels, settings.max_steps)
        admission = Admission(engine.abilities, model, limits, usual, settings.steps)
        progress.update(bar, completed=total - len(left), total=total, description="drawing")
        try:
            draw(engine, admission, left, manifest, on_done)
        finally:
            engine.close(0)
    typer.echo(f"{len(left) - bad} pictures drawn")
    if bad:
        fail(f"{bad} lines have no picture")
