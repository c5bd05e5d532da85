"""The command line, ``fp8-diffusion``."""

from __future__ import annotations

import sys
from typing import Annotated

from ..version import __version__

try:
    import typer
except ModuleNotFoundError as error:
    print(f"{error.name} is not installed; the command line needs: pip install 'fp8-compile[cli]'", file=sys.stderr)
    sys.exit(2)

from .ablate import ablate
from .batch import batch
from .compile import compile
from .convert import convert
from .generate import generate
from .inspect import inspect
from .search import search
from .serve import serve

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(generate)
app.command("text-to-image", help="Another name of generate.", rich_help_panel="Commands")(generate)
app.command()(ablate)
app.command()(batch)
app.command()(compile)
app.command()(convert)
app.command()(inspect)
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
