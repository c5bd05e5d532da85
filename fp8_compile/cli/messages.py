"""What the command line prints beside results, and the checks of where results go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer


def tell(line: str) -> None:
    """Print progress or advice, apart from results."""
    typer.echo(line, err=True)


def fail(message: str) -> NoReturn:
    """Print ``message`` and end with status 1."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(1)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """`fail` with the message of an error of this package, also of one that arose while a graph was compiled."""
    import torch

    from ..errors import Fp8Error

    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, Fp8Error):
            raise
        fail(str(error.inner_exception))
    except Fp8Error as error:
        fail(str(error))


def check_picture(output: Path) -> None:
    """Refuse before any work a picture that could not be written after all of it."""
    from PIL import Image

    valid = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if output.suffix.lower() not in valid:
        fail(f"--output {str(output)!r}: no picture format ends in {output.suffix!r}; use for example .png or .jpg")
    if not output.parent.is_dir():
        fail(f"--output {str(output)!r}: there is no directory {str(output.parent)!r}")


def check_folder(output: Path, name: str) -> None:
    """As `check_picture`, of a folder for several files of this name."""
    from ..measure.results import check_writable

    for kind in ("json", "html", "md"):
        try:
            check_writable(output / f"{name}.{kind}")
        except OSError as error:
            fail(f"--output {str(output)!r} cannot be written: {error}")
