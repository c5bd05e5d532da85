"""What a kernel of attention in FP8 is: a name, a predicate that says why not, and a function for the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Question:
    """What a kernel is asked to compute, as far as one may refuse it.

    Attributes:
        device: where.
        capability: the compute capability of an NVIDIA GPU; None of anything else.
        head_size, value_size: of queries and keys, and of values.
        inductor: whether Inductor compiles the graph.
    """

    device: torch.device
    capability: tuple[int, int] | None
    head_size: int
    value_size: int
    inductor: bool


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention in FP8.

    Attributes:
        name: as the report shows it.
        reason: why it cannot compute what is asked, or None.
        attention: ``(query, key, value, scale, dtype)`` to ``[B, Hq, S, Dv]`` in ``dtype``; takes ``[B, Hq, S, D]``,
            ``[B, Hkv, T, D]`` and ``[B, Hkv, T, Dv]``, and None for the usual scale. AOTAutograd traces through it.
        prepare: called before a graph that it is in runs; says what it changed for the whole process, or nothing.
    """

    name: str
    reason: Callable[[Question], str | None]
    attention: Callable[[Tensor, Tensor, Tensor, float | None, torch.dtype], Tensor]
    prepare: Callable[[], str] = str  # which gives ""
