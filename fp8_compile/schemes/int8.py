"""Method "int8": int8 weights, and activations quantized to int8 as they come.

A scale is ``amax / 127`` in float32: the value that one code stands for. Codes are symmetric, from -127 to 127, and
rounded to the nearest even (Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", arXiv:1712.05877, with a zero point of 0). Sums of products of codes are exact.

With the option ``rotation``, weights and activations are multiplied by a Hadamard matrix first, group by group of input
features: ``(x @ H) @ (w @ H).T == x @ w.T``, because ``H`` is orthogonal, and an outlier is spread over its group
(Ashkboos et al., "QuaRot", arXiv:2404.00456). The weight is rotated once, the activation at every call.

Plain functions of torch operators, as those of `numerics`. A rewritten graph calls them by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from .. import numerics
from ..errors import OptionError, QuantizedWeightError
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

# Group sizes of rotations: of powers of 4, one over the square root is a power of 2, by which every dtype multiplies
# without an error.
ROTATIONS = (16, 64, 256)

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
    if rows.device.type == "cuda":
        sums = sums_by_kernel(rows, weight)
    else:
        sums = torch._int_mm(rows, weight.t()) if cpu_has_int8() else sums_in_float32(rows, weight)
    # The weight's scale first: it is the smaller one, and a large activation overflows only where its result does.
    out = sums.float() * weight_scale.reshape(-1) * scale.reshape(-1, 1)
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype).view(out_shape)


@functools.cache
def cpu_has_int8() -> bool:
    """Whether this CPU has instructions that multiply int8 (VNNI), and torch uses them.

    With them ``torch._int_mm`` took 20 ms for 1,024 x 1,024 by 1,024 x 4,096 (AMD EPYC; float32: 90). Without, it runs
    in a plain loop (https://github.com/pytorch/pytorch/pull/136942). Where oneDNN is told not to use them
    (``ONEDNN_MAX_CPU_ISA=AVX2``), it saturates sums of two products to 16 bits, so the largest ones are asked for.
    """
    cpu: Any = torch.cpu
    if not cpu._is_vnni_supported():
        return False
    with numerics.on_real_tensors():
        largest = torch.full((32, 64), LARGEST, dtype=torch.int8)
        return bool((torch._int_mm(largest, largest.t()) == 64 * LARGEST**2).all())


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
    """What `sums_by_kernel` computes, to the bit: float32 sums of at most 1,024 products, added in int32."""
    chunks = zip(torch.split(values, EXACT_K, dim=1), torch.split(weight, EXACT_K, dim=1), strict=True)
    parts: list[Tensor] = [(v.float() @ w.float().t()).to(torch.int32) for v, w in chunks]
    return functools.reduce(torch.add, parts)


def hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix, ``[size, size]``, symmetric and orthogonal, with the dtype and device of ``like``.

    Its entry ``[i, j]`` is ``(-1) ** popcount(i & j) / sqrt(size)``, made by operators so that graphs hold no constant.

    Args:
        size: a power of 2, at most 256.
    """
    index = torch.arange(size, device=like.device)
    parity = index.unsqueeze(1) & index
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return ((1 - 2 * (parity & 1)) / math.sqrt(size)).to(like.dtype)


@numerics.as_written
def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix


def rotate(x: Tensor, size: int) -> Tensor:
    """``x``, ``[..., K]``, with each ``size`` features multiplied by `hadamard`; in its own dtype.

    Doing so twice gives ``x`` again, up to rounding.
    """
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return _times(groups, hadamard(size, x)).flatten(-2)


# Graphs call functions by name, so each size has its own.
def rotate_16(x: Tensor) -> Tensor:
    return rotate(x, 16)


def rotate_64(x: Tensor) -> Tensor:
    return rotate(x, 64)


def rotate_256(x: Tensor) -> Tensor:
    return rotate(x, 256)


def int8_quantize_rotated_16(x: Tensor) -> Quantized:
    return int8_quantize_rowwise(rotate(x, 16))


def int8_quantize_rotated_64(x: Tensor) -> Quantized:
    return int8_quantize_rowwise(rotate(x, 64))


def int8_quantize_rotated_256(x: Tensor) -> Quantized:
    return int8_quantize_rowwise(rotate(x, 256))


@dataclass(frozen=True)
class Int8(Scheme):
    """Int8 codes with float32 scales: one for each output channel of a weight, one for each token of an activation.

    Attributes:
        min_m: a linear whose activation has fewer rows per sample (M: tokens, or 1 for a vector), whatever the batch,
            is not multiplied in int8.
        small_m: what becomes of it: "weight-only" reads its int8 weight and multiplies in float32, "keep" leaves it as
            it is, which is for compilation only.
        rotation: None, or how many input features are rotated together before they are quantized: one of `ROTATIONS`.

    Raises:
        OptionError: a value is not valid.
    """

    method: ClassVar[str] = "int8"
    call_options: ClassVar[tuple[str, ...]] = ("min_m", "small_m")

    min_m: int = 8
    small_m: str = "weight-only"
    rotation: int | None = None

    def __post_init__(self) -> None:
        check_few_rows(self.min_m, self.small_m)
        if self.rotation is not None and (type(self.rotation) is not int or self.rotation not in ROTATIONS):
            raise OptionError(f"rotation={self.rotation!r} is not valid; valid: None, {', '.join(map(str, ROTATIONS))}")

    @property
    def label(self) -> str:
        return CALLS[self.rotation][0].name

    @property
    def on_cpu(self) -> str:
        dtype = "int8, for which this CPU has instructions" if cpu_has_int8() else "float32"
        return f"int8 codes are multiplied in {dtype}"

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return {
            "qdata": Spec((out_features, in_features), torch.int8),
            "scale": Spec((out_features, 1), torch.float32),
        }

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        return int8_quantize_weight(weight if self.rotation is None else rotate(weight.float(), self.rotation))

    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        qdata, scale = constants
        values = numerics.dequantize(qdata, scale, torch.float32)
        return (values if self.rotation is None else rotate(values, self.rotation)).to(dtype)

    def for_call(self, m: float, device: torch.device) -> tuple[Call, ...]:
        rowwise, weight_only = CALLS[self.rotation]
        return few_rows(m, self.min_m, self.small_m, weight_only) or (rowwise,)

    def check_at_load(self) -> None:
        check_few_rows_at_load(self.small_m)

    def reason(self, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
        # What CUDA's kernel asks for; kept on every device so that decisions do not differ.
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if features % MULTIPLE:
                return f"{name} {features} is not a multiple of {MULTIPLE}"
        if self.rotation is not None and in_features % self.rotation:
            return f"in_features {in_features} is not a multiple of rotation {self.rotation}"
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


def _rotated(
    size: int, quantize: Callable[[Tensor], Quantized], rotate: Callable[[Tensor], Tensor]
) -> tuple[Call, Call]:
    return (
        Call(f"int8-row-rotated-{size}", int8_linear, quantize),
        Call(f"int8-weight-only-rotated-{size}", numerics.weight_only_linear, rotate),
    )


# By rotation: how many rows run, and how few.
CALLS: dict[int | None, tuple[Call, Call]] = {
    None: (ROWWISE, WEIGHT_ONLY),
    16: _rotated(16, int8_quantize_rotated_16, rotate_16),
    64: _rotated(64, int8_quantize_rotated_64, rotate_64),
    256: _rotated(256, int8_quantize_rotated_256, rotate_256),
}
