"""Progress of long work on a terminal; nothing where stderr is none, or with ``--quiet``."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .messages import quiet


def is_shown() -> bool:
    """Whether anybody would see progress."""
    return not quiet.get() and sys.stderr.isatty()


def hush_libraries() -> None:
    """Let diffusers and transformers show no bars of their own where ours are not shown."""
    if is_shown():
        return
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class DrawingProgress:
    """A bar of denoising steps over all pictures, which also says which graph is compiled."""

    def __init__(self, pictures: int) -> None:
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not is_shown(),
            transient=True,
        )
        self._pictures = pictures
        self._task = self._bar.add_task("drawing", total=None)

    def __enter__(self) -> DrawingProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def picture(self, number: int) -> None:
        """Picture ``number``, from 1, is begun."""
        which = f" {number} of {self._pictures}" if self._pictures > 1 else ""
        self._bar.reset(self._task, description=f"drawing{which}")

    def compiling(self, graph: int, function: str) -> None:
        """See `StepClock`."""
        name = f": {function.removesuffix('.forward')}" if function else ""
        self._bar.update(self._task, description=f"compiling graph {graph}{name}")

    def step(self, done: int, steps: int) -> None:
        """See `generate`."""
        self._bar.update(self._task, completed=done, total=steps, description="denoising")
