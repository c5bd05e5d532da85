"""What the command line prints beside results, and the checks of where results go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

import typer

VIDEO_SUFFIX = ".mp4"


quiet: ContextVar[bool] = ContextVar("quiet", default=False)
"""Whether the command that runs shall print results and errors alone."""


def tell(line: str) -> None:
    """Print progress or advice, apart from results."""
    if not quiet.get():
        typer.echo(line, err=True)


def fail(message: str, status: int = 2) -> NoReturn:
    """Print ``message`` and end.

    Args:
        status: 2: what was asked is refused; 1: work was done, and failed.
    """
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(status)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """`fail` with the message of an error of this package, also of one that arose while a graph was compiled.

    Of those, a ValueError is of what was given.
    """
    import torch

    from ..errors import Fp8Error

    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Fp8Error):
            raise
        fail(str(error.inner_exception), _status(error.inner_exception))
    except Fp8Error as error:
        fail(str(error), _status(error))


def _status(error: Exception) -> int:
    return 2 if isinstance(error, ValueError) else 1


def check_file(output: Path, videos: bool | None = False) -> None:
    """Refuse before any work a picture or video that could not be written after all of it.

    Args:
        videos: the model makes videos; None: that is not known yet.
    """
    suffix = output.suffix.lower()
    if output.is_dir():
        fail(f"--output {str(output)!r} is a folder; expected a file, such as {str(output / 'out.png')!r}")
    if videos and suffix != VIDEO_SUFFIX:
        fail(f"--output {str(output)!r}: the model makes videos, which are written as {VIDEO_SUFFIX}")
    if videos is False and suffix == VIDEO_SUFFIX:
        fail(f"--output {str(output)!r}: the model draws pictures; use for example .png or .jpg")
    if suffix != VIDEO_SUFFIX and suffix not in _picture_suffixes():
        fail(f"--output {str(output)!r}: no picture format ends in {output.suffix!r}; use for example .png or .jpg")
    if not output.parent.is_dir():
        fail(f"--output {str(output)!r}: there is no directory {str(output.parent)!r}")
    existed = output.exists()
    try:  # only trying tells: a folder of /proc claims that it may be written
        output.open("ab").close()
    except OSError as error:
        fail(f"--output {str(output)!r} cannot be written: {error.strerror}")
    if not existed:
        output.unlink()


def _picture_suffixes() -> set[str]:
    require("PIL", extra="quality")
    from PIL import Image

    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}


def require(*modules: str, extra: str = "serve") -> None:
    """Say what to install where ``extra`` is not."""
    import importlib

    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            fail(f"{error.name} is not installed; this needs: pip install 'fp8-compile[{extra}]'")


def check_folder(output: Path, name: str) -> None:
    """As `check_file`, of a folder for several files of this name."""
    from ..measure.results import check_writable

    for kind in ("json", "html", "md"):
        try:
            check_writable(output / f"{name}.{kind}")
        except OSError as error:
            fail(f"--output {str(output)!r} cannot be written: {error}")
