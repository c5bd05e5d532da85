"""The application of ``fp8-diffusion serve --ray`` for a config of ``serve run`` and ``serve deploy``."""

from __future__ import annotations

import contextlib
import shlex
from typing import TYPE_CHECKING

import typer

from ..errors import OptionError
from .main import app

if TYPE_CHECKING:
    from ray.serve import Application


def application(args: dict[str, str]) -> Application:
    """Named by the config as ``import_path: fp8_compile.cli.ray_config:application``.

    Args:
        args: those of the config. "options": the command line after ``fp8-diffusion serve --ray``, without ``--host``
            and ``--port``, which are the config's ``http_options``.

    Raises:
        OptionError: there is something else in ``args``, or an option is not valid.
    """
    if args.keys() != {"options"}:
        raise OptionError(f"args: expected 'options' alone, got {', '.join(args) or 'nothing'}")
    made: list[Application] = []
    with contextlib.suppress(SystemExit):  # as a command ends; what is not valid it has printed
        typer.main.get_command(app)(["serve", "--ray", *shlex.split(args["options"])], obj=made.append)
    if not made:
        raise OptionError(f"options={args['options']!r} are not valid; the log has the reason")
    return made[0]
