"""Progress of long work on a terminal; nothing where stderr is none, or with ``--quiet``."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from .messages import quiet


def is_shown() -> bool:
    """Whether anybody would see progress."""
    return not quiet.get() and sys.stderr.isatty()


def hush_libraries() -> None:
    """Let diffusers and transformers show no bars of their own where ours are not shown."""
    if not is_shown():
        _hush()


def _hush() -> None:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """A bar of bytes while the weights of a pipeline on this disk are loaded.

    Libraries tell of parts and files only, some of which are a thousand times as large as others. So it shows by how
    much the process has grown, which is at most as much as its files are. What comes from a hub has bars of its own.
    """
    total = _bytes_to_load(model) if is_shown() else 0
    if total == 0:
        yield
        return
    _hush()
    before, done = peak_bytes(), threading.Event()
    columns = SpinnerColumn(), TextColumn("loading"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def follow() -> None:
            while not done.wait(0.1):
                bar.update(task, completed=min(total, peak_bytes() - before))

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()


def _bytes_to_load(model: str) -> int:
    """What the weights of a pipeline take on this disk; 0 of one from a hub."""
    from ..pipelines.session import pipeline_index

    index, source = pipeline_index(model)
    return sum(_weight_bytes(Path(source) / name) for name in index)


def _weight_bytes(folder: Path) -> int:
    """Those of one part; 0 if it has none. Variants, such as fp16, are not loaded."""
    for kind in ("safetensors", "bin"):
        files = [file for file in folder.glob(f"*.{kind}") if file.name.count(".") == 1]
        if files:
            return sum(file.stat().st_size for file in files)
    return 0


def peak_bytes() -> int:
    """Of memory, that this process has had at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
