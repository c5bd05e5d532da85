"""Heuristics for kernels whose thread blocks reduce a row each, as the quantization of an activation does."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from .source_hash import source_hash

# With a row each, half the multiprocessors of an H200 are busy; and a thread block reads so many values in the time
# that launching another kernel takes.
_MANY_ROWS, _LONG_ROW = 64, 65536
# What 512 threads, the most that Inductor gives to such a kernel, hold in registers: 32 values each.
_PERSISTENT_ROW = 16384


class WholeRows(InductorChoices):
    """Reduces each row by one thread block, in registers."""

    # Static methods in InductorChoices until torch 2.13, methods since.
    def reduction_split_factor(  # type: ignore[override, unused-ignore]
        self, device: torch.device, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool
    ) -> int:
        # Splitting a row over several thread blocks costs two kernels more, and the activation a round trip.
        rows = inner_reduction or _may_be_a_concatenation(reduction_numel_hint, numel_hint)
        if rows and numel_hint >= _MANY_ROWS and reduction_numel_hint <= _LONG_ROW:
            return 1
        given = device, reduction_numel_hint, numel_hint, inner_reduction
        return int(super().reduction_split_factor(*given))

    def should_use_persistent_reduction(  # type: ignore[override, unused-ignore]
        self, features: Any, cooperative_reduction: bool
    ) -> bool:
        # In a loop, everything fused before the amax would be computed a second time for the cast.
        rows = features.get_reduction_hint() == ReductionHint.INNER
        strict = getattr(features, "strict_reduction_rblock", lambda: None)() is not None  # torch 2.15
        if rows and not (cooperative_reduction or strict) and config.triton.persistent_reductions:
            return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, _PERSISTENT_ROW))
        return bool(super().should_use_persistent_reduction(features, cooperative_reduction))

    def uuid(self) -> str:
        return source_hash()


def whole_rows() -> contextlib.AbstractContextManager[Any]:
    """Our heuristics for the compilation inside, unless others than Inductor's own are in force."""
    if type(V.choices) is not InductorChoices:
        return contextlib.nullcontext()
    return cast("contextlib.AbstractContextManager[Any]", V.set_choices_handler(WholeRows()))


def heuristics_in_force() -> str:
    """What tells the active heuristics apart: Inductor's cache key does not include them."""
    kind = type(V.choices)
    uuid = getattr(V.choices, "uuid", None)
    return f"{kind.__module__}.{kind.__qualname__} {uuid() if callable(uuid) else ''}"


def _may_be_a_concatenation(width: int, rows: int) -> bool:
    """Before torch 2.13, Inductor takes the rows of a concatenation, such as in FLUX's single blocks, for columns."""
    old = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
    return old and width > 8192 and rows >= 1024  # columns so long would be sums over all tokens of a video
