"""Options of all commands: files of settings, and how much is told."""

from __future__ import annotations

import difflib
import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .messages import fail, quiet

GENERAL = "General"


def use_settings(context: typer.Context, found: Mapping[str, Any], where: str) -> None:
    """Let ``found`` stand for what the command line does not give.

    Args:
        found: by names of options, with hyphens or underscores.
        where: that they come from, for messages.
    """
    options = {parameter.name: parameter for parameter in context.command.params if parameter.name is not None}
    known = sorted(options.keys() - {"config", "help"})
    read = {}
    for given, value in found.items():
        name = given.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            fail(f"{where}: {context.command.name} has no option {given!r}{hint}")
        if isinstance(value, Mapping):
            fail(f"{where}: {given}: expected a value, got a table")
        several = getattr(options[name], "multiple", False)
        if isinstance(value, list) and not several:
            fail(f"{where}: {given}: expected one value, got a list")
        read[name] = [value] if several and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **read}


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not context.resilient_parsing:
        try:
            found = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            fail(f"--config {path}: cannot be read as TOML: {error}")
        use_settings(context, found, f"--config {path}")
    return path


COMMON: tuple[tuple[str, Any, Any], ...] = (
    (
        "config",
        Annotated[
            Path | None,
            typer.Option(
                callback=_read_config,
                is_eager=True,
                help="TOML file with options by their names, such as steps = 30. The command line wins.",
                rich_help_panel=GENERAL,
            ),
        ],
        None,
    ),
    (
        "quiet",
        Annotated[
            bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors.", rich_help_panel=GENERAL)
        ],
        False,
    ),
    (
        "verbose",
        Annotated[
            bool, typer.Option("--verbose", "-v", help="Log the decision on each layer.", rich_help_panel=GENERAL)
        ],
        False,
    ),
)
"""Name, annotation and default of each."""


def set_verbosity(be_quiet: bool, verbose: bool) -> None:
    """What ``--quiet`` and ``--verbose`` ask for."""
    if be_quiet and verbose:
        fail("--quiet and --verbose exclude each other; leave one out")
    quiet.set(be_quiet)
    if verbose:
        from torch._logging import set_logs  # type: ignore[attr-defined]

        set_logs(modules={"fp8_compile": logging.DEBUG})
