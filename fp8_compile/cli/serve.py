"""``fp8-diffusion serve``: an image server that speaks OpenAI's Images API."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import (
    CompileSettings,
    IgnoredLayers,
    NoQuantization,
    check_no_quantization,
    parse_patterns,
    with_options,
)
from .messages import errors_as_messages, fail, tell

if TYPE_CHECKING:
    from ..pipelines.session import Session


@with_options
@errors_as_messages()
def serve(
    context: typer.Context,
    settings: CompileSettings,
    model: Annotated[
        str,
        typer.Argument(
            metavar="[DIR_OR_ID]",
            help="Directory or hub name of a diffusers pipeline, or a small one of the package: embedded:qwen-image, "
            "embedded:z-image.",
        ),
    ] = "embedded:qwen-image",
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
    warmup: Annotated[
        list[str] | None,
        typer.Option(help="A size to draw before it is ready; repeat it. Default: --sizes, or the pipeline's own."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a picture of medium quality. Default: the pipeline's.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A LoRA file that requests may name; repeat it."),
    ] = None,
    max_pixels: Annotated[int, typer.Option(min=256, help="Of a picture, without --sizes.")] = 4 * 1024 * 1024,
    max_steps: Annotated[int, typer.Option(min=1, help="That a request may ask for.")] = 100,
    max_batch: Annotated[int, typer.Option(min=1, max=7, help="Pictures drawn together; 1: each alone.")] = 4,
    max_queue: Annotated[int, typer.Option(min=10, help="Pictures that may wait; more are refused with 429.")] = 64,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that a request may take, waiting included.")] = 600,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish what was accepted, at the end.")] = 30,
    no_quantization: NoQuantization = False,
    ignored_layers: IgnoredLayers = None,
) -> None:
    """Serve pictures over OpenAI's Images API."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; serving needs: pip install 'fp8-compile[cli,serve]'")

    from rich.console import Console
    from rich.progress import Progress

    from ..serve.admission import Limits
    from ..serve.app import ServerSettings, run
    from ..serve.engine import Engine
    from ..serve.guard import check_host

    if no_quantization:
        check_no_quantization(context, ("quantization", "ignored_layers", "granularity", "small_m"))
    keys = tuple(api_key or ())
    check_host(host, keys, no_key)
    patterns, chosen = parse_patterns(ignored_layers)
    options = settings.options(patterns if chosen else _default_patterns(model))
    served, drawn_first = _sizes("--sizes", sizes), _sizes("--warmup", warmup)
    adapters = _loras(lora)
    _set_up_logs()

    def load() -> Session:
        from ..pipelines.adapters import Adapters
        from ..pipelines.session import Session

        at_load = None if no_quantization else {**options, "strict": True}
        session = Session.load(model, settings.dtype, settings.device, quantized=not no_quantization, at_load=at_load)
        if adapters:
            session = dataclasses.replace(session, adapters=Adapters(session.pipe, adapters))
        if no_quantization:
            session.compile_unquantized(settings.inner_backend, settings.compile_mode, dynamic=True)
        else:
            _tell_kept(session)
            session.compile(options, dynamic=True)
        return session

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading", total=None)

        def on_progress(done: int, total: int, what: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"warm-up: {what}")

        engine = Engine(load, drawn_first or served, max_batch, max_queue, on_progress)

        def on_ready() -> None:
            progress.stop()
            tell(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}/v1 serves {name or model}")

        usual = drawn_first[0] if drawn_first else None
        limits = Limits(served, max_pixels, max_steps)
        run(engine, ServerSettings(name or model, keys, limits, usual, steps, deadline), host, port, grace, on_ready)


def _default_patterns(model: str) -> list[str]:
    """What is kept where nothing is said; none of a pipeline of the package, which was measured without."""
    from ..embedded import embedded_name
    from ..options import RECOMMENDED

    return [] if embedded_name(model) is not None else [RECOMMENDED]


def _tell_kept(session: Session) -> None:
    """Say which layers stay as they are by pattern."""
    from ..weights.records import record_of

    for module in session.denoisers.values():
        record = record_of(module)
        patterns = () if record is None else record.options.get("ignored_layers", ())
        kept = (
            f"keeps {', '.join(patterns)}; --ignored-layers none converts everything" if patterns else "keeps nothing"
        )
        tell(f"{type(module).__name__}: {kept}")


def _sizes(option: str, given: Sequence[str] | None) -> list[tuple[int, int]]:
    from ..serve.pictures import parse_size

    sizes = []
    for text in (part for item in given or [] for part in item.split(",")):
        size = parse_size(text.strip())
        if size is None:
            fail(f"{option} {text!r}: expected width and height, such as 1024x1024")
        sizes.append(size)
    return sizes


def _loras(given: Sequence[str] | None) -> dict[str, Path]:
    """By name, the files of ``--lora``."""
    files: dict[str, Path] = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            fail(f"--lora {text!r}: expected NAME=PATH")
        if name in files:
            fail(f"--lora {text!r}: there are two adapters {name!r}")
        if not Path(path).is_file():
            fail(f"--lora {text!r}: there is no file {path!r}")
        files[name] = Path(path)
    return files


def _set_up_logs() -> None:
    """Warnings to stderr, and the access log, a JSON object in each line, to stdout."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    access = logging.getLogger("fp8_compile.serve.access")
    handler: Any = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
