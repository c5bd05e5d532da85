"""Method "int8": int8 weights, and activations quantized to int8 as they come.

A scale is ``amax / 127`` in float32: the value that one code stands for. Codes are symmetric, from -127 to 127, and
rounded to the nearest even (Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", arXiv:1712.05877, with a zero point of 0). Sums of products of codes are exact.

Plain functions of torch operators, as those of `numerics`. A rewritten graph calls them by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from .. import numerics
from ..errors import QuantizedWeightError
from .few_rows import check_few_rows, check_few_rows_at_load, few_rows
from .scheme import Call, Scheme, Spec

LARGEST = 127

# Sums of so many products are below 2**24, where float32 holds every integer.
EXACT_K = 1024
# Sums of more products may leave int32.
LARGEST_K = torch.iinfo(torch.int32).max // LARGEST**2

# torch._int_mm on CUDA wants more than 16 rows, and K and N that are multiples of 8:
# https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Blas.cpp
KERNEL_ROWS = 17
PADDED_ROWS = 32
MULTIPLE = 8

Quantized = tuple[Tensor, Tensor]
"""Int8 codes and the float32 scale that multiplies them."""


def _scale(amax: Tensor) -> Tensor:
    scale = (amax.float() / LARGEST).clamp(min=numerics.SCALE_FLOOR)
    # Integers know no NaN, so the scale alone must spoil the row: times infinity, a sum of 0 is NaN and others are not.
    return scale.masked_fill(scale.isinf(), math.nan)


def _codes(values: Tensor) -> Tensor:
    # Nothing to clamp: a quotient by the row's own scale exceeds 127 by a few roundings at most.
    return values.round().to(torch.int8, memory_format=torch.contiguous_format)


def int8_quantize_weight(weight: Tensor) -> Quantized:
    """Quantize a weight with a scale per output channel.

    Args:
        weight: ``[N, K]``, floating point.

    Returns:
        ``[N, K]`` int8, contiguous, and ``[N, 1]`` float32; a scale is NaN where its row has a NaN or an Inf.
    """
    scale = _scale(weight.abs().amax(dim=-1, keepdim=True))
    return _codes(weight.float() / scale), scale


def int8_quantize_rowwise(x: Tensor) -> Quantized:
    """Quantize an activation with one scale per row (per token).

    Times the reciprocal instead of a division, as `numerics.quantize_rowwise`, since it is done at every step.

    Args:
        x: ``[..., K]``, floating point.

    Returns:
        ``[..., K]`` int8, contiguous, and ``[..., 1]`` float32; a scale is NaN where its row has a NaN or an Inf, and
        the row's codes mean nothing then.
    """
    scale = _scale(numerics.amax_of_rows(x))
    return _codes(x.float() * (1 / scale)), scale


@numerics.as_written
def int8_linear(x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias`` on int8 codes, accumulated in int32; the scales and the bias follow in float32.

    Args:
        x: ``[..., K]`` int8 with its scale, ``[..., 1]`` float32.
        weight: ``[N, K]`` int8, contiguous.
        weight_scale: ``[N, 1]`` float32.
        bias: ``[N]`` or None.
        dtype: of the result.

    Returns:
        ``[..., N]`` in ``dtype``.
    """
    values, scale = x
    out_shape = (*values.shape[:-1], weight.shape[0])
    if statically_known_true(values.numel() == 0):  # the kernel takes no row less
        return torch.empty(out_shape, dtype=dtype, device=values.device)
    rows = values.reshape(-1, values.shape[-1])
    sums = sums_by_kernel(rows, weight) if rows.device.type == "cuda" else sums_in_float32(rows, weight)
    # The weight's scale first: it is the smaller one, and a large activation overflows only where its result does.
    out = sums.float() * weight_scale.reshape(-1) * scale.reshape(-1, 1)
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype).view(out_shape)


def sums_by_kernel(values: Tensor, weight: Tensor) -> Tensor:
    """``values @ weight.T``, ``[M, N]`` int32, by ``torch._int_mm``; rows of zeros are added where M is too small.

    Args:
        values: ``[M, K]`` int8.
        weight: ``[N, K]`` int8.
    """
    m = values.shape[0]
    if guard_or_false(m >= KERNEL_ROWS):  # where M is symbolic, another graph is compiled for the smaller ones
        return torch._int_mm(values, weight.t())
    # Nothing may be asked of an M that only a run knows, so there it gets as many rows as the smallest needs.
    more = PADDED_ROWS - m if guard_or_false(m < KERNEL_ROWS) else KERNEL_ROWS
    return torch._int_mm(F.pad(values, (0, 0, 0, more)), weight.t()).narrow(0, 0, m)


def sums_in_float32(values: Tensor, weight: Tensor) -> Tensor:
    """What `sums_by_kernel` computes, for a CPU, to the bit: float32 sums of at most 1,024 products, added in int32.

    Without VNNI, ``torch._int_mm`` runs in a plain loop on a CPU (https://github.com/pytorch/pytorch/pull/136942).
    """
    chunks = zip(torch.split(values, EXACT_K, dim=1), torch.split(weight, EXACT_K, dim=1), strict=True)
    parts: list[Tensor] = [(v.float() @ w.float().t()).to(torch.int32) for v, w in chunks]
    return functools.reduce(torch.add, parts)


@dataclass(frozen=True)
class Int8(Scheme):
    """Int8 codes with float32 scales: one for each output channel of a weight, one for each token of an activation.

    Attributes:
        min_m: a linear whose activation has fewer rows (M: tokens of the whole batch) is not multiplied in int8.
        small_m: what becomes of it: "weight-only" reads its int8 weight and multiplies in float32, "keep" leaves it as
            it is, which is for compilation only.

    Raises:
        OptionError: a value is not valid.
    """

    method: ClassVar[str] = "int8"
    call_options: ClassVar[tuple[str, ...]] = ("min_m", "small_m")
    min_capability: ClassVar[tuple[int, int]] = (8, 0)  # Ampere; Inductor writes no bfloat16 code for older ones

    min_m: int = 8
    small_m: str = "weight-only"

    def __post_init__(self) -> None:
        check_few_rows(self.min_m, self.small_m)

    @property
    def label(self) -> str:
        return ROWWISE.name

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return {
            "qdata": Spec((out_features, in_features), torch.int8),
            "scale": Spec((out_features, 1), torch.float32),
        }

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        return int8_quantize_weight(weight)

    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        qdata, scale = constants
        return numerics.dequantize(qdata, scale, dtype)

    def for_call(self, m: float, device: torch.device) -> tuple[Call, ...]:
        return few_rows(m, self.min_m, self.small_m, WEIGHT_ONLY) or (ROWWISE,)

    def check_at_load(self) -> None:
        check_few_rows_at_load(self.small_m)

    def reason(self, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
        # What CUDA's kernel asks for; kept on every device so that decisions do not differ.
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if features % MULTIPLE:
                return f"{name} {features} is not a multiple of {MULTIPLE}"
        if in_features > LARGEST_K:
            return f"in_features {in_features} is above {LARGEST_K}, so sums may leave int32"
        return None

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Scheme, tuple[Tensor, ...]]:
        found, (qdata, scale) = super().read(tensors)
        if scale.device.type != "meta" and not (scale.isfinite() & (scale > 0)).all():
            raise QuantizedWeightError("holds a scale that is NaN, infinite, zero or negative", "_scale")
        return found, (qdata, scale)


ROWWISE = Call("int8-row", int8_linear, int8_quantize_rowwise)
WEIGHT_ONLY = Call("int8-weight-only", numerics.weight_only_linear)
