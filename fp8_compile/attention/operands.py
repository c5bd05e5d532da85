"""Queries, keys and values in E4M3: plain operators, which a compiler fuses with the rotary embedding before them.

A kernel multiplies each of the three by a float32 scale, its descale, per batch and key-value head. Queries have theirs
over all heads that share a key-value head. Before keys are rounded, their mean over the tokens is subtracted: it adds
one number to all scores of a query, which the softmax does not see (SageAttention, arXiv:2410.02367), and takes with it
the channels that are large in every token, of which FP8 would keep nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import FP8_DTYPE, scale_of


@dataclass(frozen=True)
class Operands:
    """What a kernel takes.

    Attributes:
        query: ``[B, Hq, S, D]`` float8_e4m3fn.
        key: ``[B, Hkv, T, D]`` float8_e4m3fn.
        value: ``[B, Hkv, T, Dv]`` float8_e4m3fn.
        query_scale, key_scale, value_scale: ``[B, Hkv]`` float32, what one unit of each stands for.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor
    key_scale: Tensor
    value_scale: Tensor


def quantize(query: Tensor, key: Tensor, value: Tensor, *, smooth: bool = True) -> Operands:
    """The operands of an attention in E4M3.

    Args:
        query: ``[B, Hq, S, D]``, floating point.
        key: ``[B, Hkv, T, D]``; Hq is a multiple of Hkv.
        value: ``[B, Hkv, T, Dv]``.
        smooth: subtract the mean of the keys. Without, for measurements.
    """
    batch, heads = key.shape[:2]
    shared = query.shape[1] // heads
    query_scale = scale_of(query.abs().amax(dim=(-2, -1)).float().view(batch, heads, shared).amax(dim=-1))
    # In one pass over the keys: their largest distance from the mean is that of the largest or the smallest value.
    mean = key.float().mean(dim=-2, keepdim=True) if smooth else torch.zeros((), device=key.device)
    highest, lowest = key.amax(dim=-2, keepdim=True).float(), key.amin(dim=-2, keepdim=True).float()
    key_scale = scale_of(torch.maximum(highest - mean, mean - lowest).amax(dim=(-2, -1)))
    value_scale = scale_of(value.abs().amax(dim=(-2, -1)).float())
    return Operands(
        _cast(query, query_scale.repeat_interleave(shared, dim=1)),
        _cast(key.float() - mean, key_scale),
        _cast(value, value_scale),
        query_scale,
        key_scale,
        value_scale,
    )


def softmax_scale(scale: float | None, query: Tensor) -> float:
    """The factor of the scores: ``scale``, or that of ``scaled_dot_product_attention``."""
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _cast(x: Tensor, scale: Tensor) -> Tensor:
    # Without a clamp: no quotient exceeds 448 by more than a rounding.
    return (x.float() * (1 / scale)[..., None, None]).to(FP8_DTYPE)
