"""How long the steps of a pipeline take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..inductor.dynamo import being_compiled


class StepClock:
    """Times the steps of a pipeline, and apart from them what torch.compile took.

    Args:
        device: where the pipeline runs.
        on_compile: called when the compilation of a graph begins, with its number, from 1, and the name of its
            function, such as ``Block.forward``, or "".
    """

    def __init__(self, device: str | torch.device, on_compile: Callable[[int, str], None] | None = None) -> None:
        self._device = torch.device(device)
        self._on_compile = on_compile
        self.graphs = 0
        self._step_ends: list[tuple[float, float]] = []
        self.compile_seconds = 0.0
        self._compile_start = 0.0

    def __enter__(self) -> StepClock:
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._compile_started)
        callback_handler.register_end_callback(self._compile_ended)
        return self

    def __exit__(self, *_: object) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._compile_started)
        callback_handler.remove_end_callback(self._compile_ended)

    def _compile_started(self, _: Any) -> None:
        self._compile_start = time.perf_counter()
        self.graphs += 1
        if self._on_compile is not None:
            self._on_compile(self.graphs, being_compiled())

    def _compile_ended(self, _: Any) -> None:
        self.compile_seconds += time.perf_counter() - self._compile_start

    def step(self, pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A pipeline's ``callback_on_step_end``."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # another GPU than the current one, perhaps
        self._step_ends.append((time.perf_counter(), self.compile_seconds))
        return kwargs

    @property
    def seconds(self) -> list[float]:
        """Of all steps but the first, whose start is unknown; compilation is not counted."""
        pairs = zip(self._step_ends, self._step_ends[1:], strict=False)
        return [(end - compiled) - (start - before) for (start, before), (end, compiled) in pairs]

    @property
    def seconds_per_step(self) -> float | None:
        """The median of ``seconds``; None where there are none."""
        return statistics.median(self.seconds) if self.seconds else None
