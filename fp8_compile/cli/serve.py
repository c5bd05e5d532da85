"""``fp8-diffusion serve``: a server that speaks OpenAI's Images and Videos APIs."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from .arguments import ModelArgument, was_given, with_options
from .engine_settings import EngineSettings, parse_sizes
from .messages import errors_as_messages, fail, require, tell


@with_options
@errors_as_messages()
def serve(
    context: typer.Context,
    settings: EngineSettings,
    model: ModelArgument = "embedded:qwen-image",
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests and answers. Default: DIR_OR_ID.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FP8_DIFFUSION_API_KEY",
            help="A key that requests must have; repeat it. Other users of the machine can read command lines: the "
            "variable is safer, with spaces between keys.",
        ),
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Let other machines in without a key.")] = False,
    sizes: Annotated[
        list[str] | None,
        typer.Option(help="A size that may be asked for, such as 1024x1024; repeat it. Default: any."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=10, help="Pictures that may wait; more are refused with 429.")] = 64,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that a request may take, waiting included.")] = 600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish what was accepted, at the end.")] = 30,
    on_ray: Annotated[bool, typer.Option("--ray", help="Draw with workers of a Ray cluster, a GPU each.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="Workers, with --ray.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray, workers at most, as more is asked for. Default: --replicas.")
    ] = None,
) -> None:
    """Serve pictures over OpenAI's Images API, or videos over its Videos API."""
    require("fastapi", "prometheus_client", "python_multipart", "sse_starlette", "uvicorn")

    from rich.console import Console
    from rich.progress import Progress

    from ..serve.admission import Limits
    from ..serve.app import ServerSettings, run
    from ..serve.engine import Engine
    from ..serve.guard import check_access

    keys = tuple(api_key or ())
    deploy = context.obj  # see `ray_config`
    if deploy is not None and (was_given(context, "host") or was_given(context, "port")):
        fail("--host and --port have no place here: http_options of the config say where to listen")
    # Where such a config says nothing, that is everywhere.
    check_access(host if deploy is None else "0.0.0.0", keys, no_key)
    most = max_replicas or replicas
    if most > 1 and not on_ray:
        fail("--replicas and --max-replicas need --ray")
    if most < replicas:
        fail(f"--max-replicas {most} is below --replicas {replicas}")
    load = settings.loader(context, model)
    served, drawn_first = parse_sizes("--sizes", sizes), parse_sizes("--warmup", settings.warmup)
    warmup = drawn_first or served
    usual = drawn_first[0] if drawn_first else None
    limits = Limits(served, settings.max_pixels, settings.max_steps, settings.max_frames)
    answering = ServerSettings(name or model, keys, limits, usual, settings.steps, deadline)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if on_ray:
        require("ray", extra="ray")
        from ..serve import cluster

        if deploy is None:
            cluster.join_to_serve()
        spread = cluster.Spread(replicas, most, settings.max_batch, max_queue, settings.device, grace)
        made = cluster.application(load, warmup, answering, spread)
        if deploy is None:
            cluster.run(made, host, port, lambda: tell(f"ready: {address} serves {answering.model}"))
        else:
            deploy(made)
        return
    _set_up_logs()
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading", total=None)

        def on_progress(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"warm-up: {what}")

        def on_ready() -> None:
            progress.stop()
            tell(f"ready: {address} serves {answering.model}")

        engine = Engine(load, warmup, settings.max_batch, max_queue, on_progress, own_process=True)
        run(engine, answering, host, port, grace, on_ready)


def _set_up_logs() -> None:
    """Warnings to stderr, and the access log, a JSON object in each line, to stdout."""
    from ..serve.painter_process import LOG_FORMAT

    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    access = logging.getLogger("fp8_compile.serve.access")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
