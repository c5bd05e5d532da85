"""``fp8-diffusion batch``: the pictures of a file of requests."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .arguments import ModelOption, with_options
from .engine_settings import EngineSettings, parse_sizes
from .messages import errors_as_messages, fail, require, tell


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
    on_ray: Annotated[bool, typer.Option("--ray", help="Draw with workers of a Ray cluster, a GPU each.")] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Workers, with --ray. Default: one for each GPU of the cluster.")
    ] = None,
) -> None:
    """Draw a picture for each line of a file; what is in the folder's manifest is not drawn again."""
    require("pydantic", "prometheus_client", "starlette")

    from rich.console import Console
    from rich.progress import Progress

    from ..serve.admission import Limits
    from ..serve.batch import Line, Made, Manifest, Work, drawn, lines_left
    from ..serve.painter_process import LOG_FORMAT

    if replicas is not None and not on_ray:
        fail("--replicas needs --ray")
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    try:
        manifest = Manifest(output)
        left, total = lines_left(prompts, manifest)
    except (OSError, UnicodeError) as error:
        fail(str(error))
    typer.echo(f"{total - len(left)} of {total} pictures are in {output / 'manifest.jsonl'}")
    if not left:
        return
    load, warmup = settings.loader(context, model), parse_sizes("--warmup", settings.warmup)
    limits = Limits((), settings.max_pixels, settings.max_steps)
    work = Work(load, warmup, settings.max_batch, model, limits, settings.steps)
    bad = 0
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading", total=None)

        def on_progress(done: int, count: int, what: str) -> None:
            progress.update(bar, completed=done, total=count, description=f"warm-up: {what}")

        def write(results: Iterable[tuple[Line, Made | str]]) -> None:
            nonlocal bad
            for line, result in results:
                if isinstance(result, str):
                    bad += 1
                    tell(f"line {line.number}: {result}")
                else:
                    manifest.add(line, result)
                progress.advance(bar)

        def begin() -> None:
            progress.update(bar, completed=total - len(left), total=total, description="drawing")

        if on_ray:
            require("ray", "pandas", "pyarrow", extra="ray")
            from ..serve import batch_on_ray, cluster

            cluster.join()
            begin()
            write(batch_on_ray.drawn_on_ray(work, left, replicas, settings.device))
        else:
            engine, admission = work.begin(on_progress)
            if engine.abilities.rules.makes_videos:
                fail(f"{model} makes videos; this command draws pictures")
            begin()
            try:
                write(drawn(engine, admission, left))
            finally:
                engine.close(0)
    typer.echo(f"{len(left) - bad} pictures drawn")
    if bad:
        fail(f"{bad} lines have no picture", status=1)
