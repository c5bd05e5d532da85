"""The command line, ``fp8-diffusion``."""

from __future__ import annotations

import sys
from typing import Annotated

from ..version import __version__

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed; the command line needs: pip install 'fp8-compile[cli]'")

from .ablate import ablate
from .batch import batch
from .compile import compile
from .search import search
from .serve import serve
from .text_to_image import text_to_image

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(text_to_image)
app.command()(ablate)
app.command()(batch)
app.command()(compile)
app.command()(search)
app.command()(serve)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fp8-diffusion {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """FP8 inference for diffusion transformers."""


def main() -> None:
    """Entry point of the command."""
    app()
