"""Attention in FP8 by float32 arithmetic, for whoever has no kernel: what a kernel would lose, and no faster.

As FlashAttention 3 does (and not as one that would keep everything else exact), it rounds the unnormalized weights of
the softmax, which lie between 0 and 1, to E4M3 in units of 1/256, and sums them before rounding. A kernel takes them
relative to the largest score so far, and this to the largest of all: they differ in which values are rounded, not in
how much.

An operator of its own, which runs some queries at a time, whatever compiler is around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import as_written, rounded_to_e4m3
from .kernel import Kernel, Question
from .operands import Operands, quantize, softmax_scale

LARGEST_WEIGHT = 256.0
"""What FlashAttention 3 makes of a softmax weight of 1 before it rounds (``Max_offset`` in hopper/softmax.h)."""

_MOST_SCORES = 1 << 24
"""So many float32 scores at a time: 64 MB."""


def reason(question: Question) -> str | None:
    """Why it cannot stand in for a kernel: never."""
    return None


@as_written
def attention_emulated(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dtype: torch.dtype) -> Tensor:
    """Attention whose operands and softmax weights are rounded to E4M3.

    Args:
        query: ``[B, Hq, S, D]``, floating point.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        scale: of the scores, or None for ``1 / sqrt(D)``.
        dtype: of the result, ``[B, Hq, S, Dv]``.
    """
    return attend(quantize(query, key, value), softmax_scale(scale, query)).to(dtype)


def attend(operands: Operands, scale: float) -> Tensor:
    """The result of a kernel, ``[B, Hq, S, Dv]`` bfloat16."""
    o = operands
    out: Tensor = _OPERATOR(o.query, o.key, o.value, o.query_scale, o.key_scale, o.value_scale, scale)
    return out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    scale: float,
) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    factor, value_scale = (
        s.repeat_interleave(shared, dim=1)[..., None, None] for s in (query_scale * key_scale * scale, value_scale)
    )
    keys, values = (t.float().repeat_interleave(shared, dim=1) for t in (key, value))
    out = _empty(query, value)
    rows = max(1, _MOST_SCORES // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    with torch.autocast(query.device.type, enabled=False):
        for part, result in zip(torch.split(query, rows, dim=-2), torch.split(out, rows, dim=-2), strict=True):
            scores = (part.float() @ keys.mT) * factor
            weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            rounded = rounded_to_e4m3(weights.mul_(LARGEST_WEIGHT)) / LARGEST_WEIGHT
            result.copy_((rounded @ values) / total * value_scale)
    return out


def _fake(
    query: Tensor, key: Tensor, value: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor, scale: float
) -> Tensor:
    return _empty(query, value)


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """For the result: laid out as the queries are, tokens before heads, which models may count on that take a view."""
    if query.shape[-1] == value.shape[-1]:
        return torch.empty_like(query, dtype=torch.bfloat16)
    return query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=torch.bfloat16)


_library: Any = torch.library.Library("fp8_compile", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "attention_emulated(Tensor query, Tensor key, Tensor value, Tensor query_scale, Tensor key_scale, "
    "Tensor value_scale, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("attention_emulated", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("fp8_compile::attention_emulated", _fake, lib=_library)
_OPERATOR = torch.ops.fp8_compile.attention_emulated.default

EMULATED = Kernel("fp8-emulated", reason, attention_emulated)
