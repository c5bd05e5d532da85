"""A file of requests, drawn by the workers of a Ray cluster through Ray Data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from .batch import Line, Made, Work, drawn
from .cluster import ClusterError, gpus_of_cluster, gpus_of_worker


class Worker:
    """Draws with an engine of its own."""

    def __init__(self, work: Work) -> None:
        self._engine, self._admission = work.begin()

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Called by Ray Data with the columns "number" and "text" of some lines."""
        made: dict[str, list[Any]] = {"number": [], "problem": [], "file": [], "content": [], "entry": []}
        lines = [Line(int(number), str(text)) for number, text in zip(rows["number"], rows["text"], strict=True)]
        for line, result in drawn(self._engine, self._admission, lines):
            failed = isinstance(result, str)
            picture = Made("", b"", {}) if isinstance(result, str) else result
            cells = (line.number, result if failed else "", picture.file, picture.content, json.dumps(picture.entry))
            for column, cell in zip(made.values(), cells, strict=True):
                column.append(cell)
        return made


def drawn_on_ray(
    work: Work, lines: Sequence[Line], replicas: int | None, device: str | None
) -> Iterator[tuple[Line, Made | str]]:
    """As `drawn`, by ``replicas`` workers of the cluster that this process has joined, in any order.

    What a worker that dies was drawing is drawn by another. All pictures pass through this process.

    Args:
        replicas: None: one for each GPU of the cluster; one where it has none.
        device: see `Spread`.

    Raises:
        ClusterError: the workers cannot be started, or have failed.
    """
    DataContext.get_current().enable_progress_bars = False
    by_number = {line.number: line for line in lines}
    rows = [{"number": line.number, "text": line.text} for line in lines]
    # A batch at a time: what was drawn of a block is written when all of it is.
    blocks = math.ceil(len(rows) / work.max_batch)
    workers = ActorPoolStrategy(size=replicas or max(1, gpus_of_cluster()))
    data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        Worker,
        fn_constructor_args=(work,),
        batch_size=None,
        compute=workers,
        num_cpus=1,
        num_gpus=gpus_of_worker(device),
    )
    try:
        for row in data.iter_rows():
            made = Made(row["file"], row["content"], json.loads(row["entry"]))
            yield by_number[row["number"]], row["problem"] or made
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]  # after the traceback of the worker
        raise ClusterError(f"the workers have failed: {reason}") from error
