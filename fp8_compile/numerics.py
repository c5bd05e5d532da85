"""FP8 numerics: quantization, dequantization and the scaled matrix multiplication.

Plain functions of torch operators, so that AOTAutograd traces through them and Inductor fuses them. A rewritten graph
calls these functions by name. Methods in other formats have their own arithmetic beside them, in `schemes`, and share
what asks for no format: `amax_of_rows`, `dequantize`, `weight_only_linear`.

The format is E4M3 (``torch.float8_e4m3fn``: no infinity, largest value 448; Micikevicius et al., "FP8 formats for deep
learning", arXiv:2209.05433). A scale is ``amax / 448`` in float32: the value that one unit of FP8 stands for.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max

# An all-zero row has amax 0; any positive scale then gives zeros where 0 / 0 would give NaN. The smallest normal
# float32 changes no other row: bfloat16 and float16 values that small are far below what a matmul can resolve.
SCALE_FLOOR = torch.finfo(torch.float32).tiny

# That of the largest bfloat16; what a larger one stands for may be infinite.
LARGEST_SCALE = torch.finfo(torch.bfloat16).max / FP8_MAX

_TWO_SQRT = 2 * math.sqrt(2 / math.pi)

# Up to so many rows, `weight_only_linear` writes a matrix multiplication as a sum for each row.
FEW_ROWS = 16

_cpu: Any = torch.cpu
CPU_HAS_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(
    _cpu._is_avx512_bf16_supported() or _cpu._is_amx_tile_supported()
)
"""Whether this CPU has instructions that multiply bfloat16, and ``ATEN_CPU_CAPABILITY`` does not forbid them."""

Quantized = tuple[Tensor, Tensor]
"""FP8 values and the float32 scale that multiplies them."""


def scale_of(amax: Tensor) -> Tensor:
    """The float32 scale that values call for whose largest magnitude is ``amax``."""
    return (amax.float() / FP8_MAX).clamp(min=SCALE_FLOOR)


@contextlib.contextmanager
def on_real_tensors() -> Iterator[None]:
    """Inside, operators run at once and on real tensors, whatever is traced around; to find out what a device does."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    with unset_fake_temporarily(), _disable_current_modes():
        yield


def quantize_weight_with(weight: Tensor, amax: Tensor) -> Quantized:
    """Quantize ``weight`` with the scale that ``amax``, its own and broadcastable to it, calls for."""
    scale = scale_of(amax)
    # Without a clamp: no quotient exceeds 448 by more than a rounding, and all that is below 464 is cast to 448.
    # The kernels read rows; the layout of the weight, which a cast would otherwise keep, may be another.
    return (weight.float() / scale).to(FP8_DTYPE, memory_format=torch.contiguous_format), scale


def quantize_weight_rowwise(weight: Tensor) -> Quantized:
    """Quantize ``weight``, ``[N, K]``, with a scale per output channel, ``[N, 1]`` float32."""
    values = weight.float()  # once: a CPU takes the maximum of float32 in half the time
    return quantize_weight_with(values, values.abs().amax(dim=-1, keepdim=True))


def quantize_weight_rowwise_into(values: Tensor, scale: Tensor, weight: Tensor, rows: int) -> None:
    """Write what `quantize_weight_rowwise` returns, to the bit, into ``values`` and ``scale``; for a CPU.

    A few rows at a time, in memory that is allocated once: new memory for each result would take a third of the time.

    Args:
        values: ``[N, K]`` float8_e4m3fn.
        scale: ``[N, 1]`` float32.
        weight: ``[N, K]``.
        rows: how many at a time.
    """
    wide, magnitudes = (torch.empty(rows, weight.shape[1]) for _ in range(2))
    for chunk, qdata, of_rows in zip(*(torch.split(t, rows) for t in (weight, values, scale)), strict=True):
        x = wide[: len(chunk)].copy_(chunk)
        of_rows.copy_(scale_of(torch.abs(x, out=magnitudes[: len(chunk)]).amax(dim=-1, keepdim=True)))
        qdata.copy_(x.div_(of_rows))


def quantize_weight_tensorwise(weight: Tensor) -> Quantized:
    """Quantize ``weight``, ``[N, K]``, with one float32 scale without dimensions."""
    if statically_known_true(weight.numel() == 0):
        return weight.to(FP8_DTYPE), weight.new_ones((), dtype=torch.float32)
    values = weight.float()
    return quantize_weight_with(values, values.abs().amax())


def _quantize_with(x: Tensor, amax: Tensor) -> Quantized:
    """Quantize an activation whose own amax is given.

    With fewer instructions than a weight, since it is done at every step: times the reciprocal instead of a division.
    Against one, 2 in 10,000 values take the neighbouring code.
    """
    scale = scale_of(amax)
    reciprocal = 1 / scale  # finite, because of the scale's floor
    return (x.float() * reciprocal).to(FP8_DTYPE, memory_format=torch.contiguous_format), scale


def _amax(x: Tensor, dim: tuple[int, ...], by_bits: bool) -> Tensor:
    """The largest ``|x|`` over ``dim``, which stay as 1, in float32; NaN if there is one.

    By the bits of a float32 without the sign, as integers, which order as magnitudes do, it takes a GPU fewer
    instructions: NaN are the largest of all, and need none of their own.
    """
    if by_bits:
        return (x.float().view(torch.int32) & 0x7FFFFFFF).amax(dim=dim, keepdim=True).view(torch.float32)
    return x.abs().amax(dim=dim, keepdim=True).float()


def amax_of_rows(x: Tensor) -> Tensor:
    """The largest ``|x|`` of each row of ``x``, ``[..., K]``: ``[..., 1]`` float32, NaN where the row has one."""
    return _amax(x, (-1,), by_bits=x.device.type == "cuda")


def quantize_rowwise(x: Tensor) -> Quantized:
    """Quantize an activation with one scale per row (per token).

    Args:
        x: ``[..., K]``, floating point.

    Returns:
        ``[..., K]`` float8_e4m3fn, contiguous, and ``[..., 1]`` float32.
    """
    return _quantize_with(x, amax_of_rows(x))


def quantize_tensorwise(x: Tensor) -> Quantized:
    """Quantize an activation with a single scale for the whole tensor.

    Args:
        x: ``[..., K]``, floating point.

    Returns:
        ``[..., K]`` float8_e4m3fn, contiguous, and a float32 scale without dimensions.
    """
    if statically_known_true(x.numel() == 0):
        return x.to(FP8_DTYPE), x.new_ones((), dtype=torch.float32)
    return _quantize_with(x, _amax(x, tuple(range(x.dim())), by_bits=x.device.type == "cuda").reshape(()))


def _saturated(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` in units of ``scale``, for a cast to E4M3 that makes 448 of what is larger, and NaN of NaN and infinities.

    A clamp costs twice the instructions of all the rest, so there is one only where the cast does not saturate itself.
    """
    values = x.float()
    scaled = values * (1 / scale)
    if not _cast_saturates():
        scaled = scaled.clamp(-FP8_MAX, FP8_MAX)
    return scaled + values * 0.0  # 0 for a finite value, else NaN


@functools.cache
def _cast_saturates() -> bool:
    """Whether torch's cast makes 448 of what is larger. torch 2.11 made NaN, other than Triton's for a GPU."""
    with on_real_tensors():
        return bool(torch.tensor(2 * FP8_MAX).to(FP8_DTYPE).float() == FP8_MAX)


def quantize_static_rowwise(x: Tensor, input_scale: Tensor, ones: Tensor) -> Quantized:
    """Quantize an activation with a scale that was known before; for weights into whose scales that one is multiplied.

    Args:
        x: ``[..., K]``, floating point.
        input_scale: float32 without dimensions.
        ones: ``[R, 1]`` float32, R at least the rows of ``x``: kernels for row-wise scales take them.

    Returns:
        ``[..., K]`` float8_e4m3fn, contiguous, and ``[M, 1]`` float32, all ones.
    """
    values = _saturated(x, input_scale).to(FP8_DTYPE, memory_format=torch.contiguous_format)
    return values, ones.narrow(0, 0, math.prod(x.shape[:-1]))


def quantize_static_tensorwise(x: Tensor, input_scale: Tensor) -> Quantized:
    """Quantize an activation with a scale that was known before.

    Args:
        x: ``[..., K]``, floating point.
        input_scale: float32 without dimensions.

    Returns:
        ``[..., K]`` float8_e4m3fn, contiguous, and ``input_scale``.
    """
    return _saturated(x, input_scale).to(FP8_DTYPE, memory_format=torch.contiguous_format), input_scale


def rounded_to_e4m3(x: Tensor) -> Tensor:
    """What ``x.to(float8_e4m3fn).float()`` is, to the bit, in float32 operators: for CPUs, which have no such cast.

    Veltkamp's splitting leaves the 4 leading bits (T. J. Dekker, "A floating-point technique for extending the
    available precision", 1971), below the smallest normal number, 2**-6, an addition leaves multiples of 2**-9. Both
    round to the nearest even, if nothing is contracted or reassociated.

    Args:
        x: float32; what is beyond 448 becomes 448, as by torch's own cast from 2.13 on.
    """
    x = x.clamp(-FP8_MAX, FP8_MAX)
    split = x * (2.0**20 + 1)
    normal = split - (split - x)
    subnormal = (x + 1.5 * 2.0**14) - 1.5 * 2.0**14
    return torch.where(x.abs() < 2.0**-6, subnormal, normal)


def decoded_e4m3(values: Tensor) -> Tensor:
    """What ``values.float()`` is, to the bit, by integer operators.

    By way of bfloat16, which rounds nothing, because Inductor then handles twice as many values at a time with AVX2.

    Args:
        values: float8_e4m3fn.
    """
    return _decoded(values.view(torch.int8).to(torch.int32)).to(torch.bfloat16).float()


def decoded_by_words(values: Tensor) -> Tensor:
    """The same of four codes at a time, for a compiler that cannot even load E4M3: Triton below compute capability 8.9.

    Args:
        values: ``[..., K]`` float8_e4m3fn, contiguous, K a multiple of 4.
    """
    words = values.view(torch.int32).unsqueeze(-1)
    left = torch.arange(24, -1, -8, dtype=torch.int32, device=values.device)
    return _decoded((words << left) >> 24).flatten(-2)


def _decoded(code: Tensor) -> Tensor:
    """The float32 values of E4M3 codes, int32 with their signs extended.

    Sign, exponent and mantissa are put where float32 has them, and the product is for the difference of the exponents'
    biases. It holds for subnormal codes too, unless ``torch.set_flush_denormal`` makes zeros of them.
    """
    bits = (code << 20) & _SIGN_AND_VALUE
    return (bits.view(torch.float32) * 2.0**120).masked_fill((code & 0x7F) == 0x7F, math.nan)


_SIGN_AND_VALUE = 0x87F00000 - (1 << 32)
"""Of a code, shifted by 20 bits, what float32 has at the same place, as int32."""


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """GELU's approximation with tanh (Hendrycks and Gimpel, arXiv:1606.08415), written as ``x * sigmoid(2 * u)``.

    Args:
        x: floating point. ``u`` is ``sqrt(2 / pi) * (x + 0.044715 * x ** 3)``, in float32.

    Returns:
        As ``x``: shape and dtype.
    """
    value = x.float()
    return (value * torch.sigmoid(_TWO_SQRT * value * (1 + 0.044715 * value * value))).to(x.dtype)


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that ``values`` and ``scale`` stand for, in ``dtype``.

    Args:
        values: ``[..., K]`` float8_e4m3fn or int8.
        scale: float32, broadcastable to ``values``.
    """
    return (values.float() * scale).to(dtype)


def as_written(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` without the caller's autocast, which would cast float32 operands to half precision."""

    @functools.wraps(function)
    def run(x: Any, weight: Tensor, *more: Any) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return function(x, weight, *more)

    return run


@as_written
def scaled_linear(
    x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` on FP8 operands, accumulated in float32.

    Args:
        x: ``[..., K]`` float8_e4m3fn with its scale, ``[..., 1]`` (row-wise) or without dimensions (tensor-wise).
        weight: ``[N, K]`` float8_e4m3fn, contiguous.
        weight_scale: ``[N, 1]`` (row-wise) or without dimensions, float32; of the same granularity as ``x``.
        bias: ``[N]`` or None.
        dtype: of the result.

    Returns:
        ``[..., N]`` in ``dtype``.
    """
    values, scale = x
    out_shape = (*values.shape[:-1], weight.shape[0])
    if statically_known_true(values.numel() == 0):  # not every kernel takes zero rows
        return torch.empty(out_shape, dtype=dtype, device=values.device)

    rowwise = weight_scale.dim() == 2
    values = values.reshape(-1, values.shape[-1])
    if rowwise:
        scale = scale.reshape(-1, 1)
    if not has_kernel(values.device.type):
        return _linear_on_cpu(values, scale, weight, weight_scale, bias, dtype).view(out_shape)

    # CUDA's row-wise kernels write bfloat16 only: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/ScaledBlas.cpp
    kernel_dtype = torch.bfloat16 if rowwise and values.device.type == "cuda" else dtype
    kernel_bias = bias if bias is not None and bias.dtype == kernel_dtype else None
    out = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale.t() if rowwise else weight_scale,
        bias=kernel_bias,
        out_dtype=kernel_dtype,
        use_fast_accum=values.device.type == "cuda",
    ).to(dtype)
    if bias is not None and kernel_bias is None:
        out = out + bias.to(dtype)
    return out.view(out_shape)


@as_written
def linear_then_scale(
    x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`scaled_linear` with row-wise scales where no kernel takes them: they multiply the sums afterwards.

    The matmul is one with a scale of 1 for the whole, which every FP8 kernel knows; a compiler fuses the rest with what
    comes next. The sums are rounded to bfloat16 once more, before the scales; its range holds 448 * 448 * K for any K.
    """
    values, scale = x
    one = torch.ones((), dtype=torch.float32, device=values.device)
    out = scaled_linear((values, one), weight, one, None, torch.bfloat16)
    out = out.float() * scale * weight_scale.view(-1)
    return (out if bias is None else out + bias.float()).to(dtype)


def has_kernel(device_type: str) -> bool:
    """Whether ``torch._scaled_mm`` is worth calling on this kind of device.

    The CPU's takes its operands apart one by one (torch 2.13): with a scale per row 1,024 x 1,024 by 1,024 x 4,096 took
    127 ms where `_linear_on_cpu` took 93, and with a scale per tensor 64 x 256 by 256 x 1,024 took 571 ms instead of 2.
    """
    return device_type != "cpu"


def _linear_on_cpu(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same sum as the kernel's: scales after the products, bias before rounding to ``dtype``.

    Products are exact in either dtype. By way of float32, into which Inductor casts FP8 with vector instructions.
    """
    products = products_dtype(values.device, torch.bfloat16)
    left, right = (t.float().to(products) for t in (values, weight))
    out = (left @ right.t()).float() * scale * weight_scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)


def products_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which dtype ``device`` multiplies matrices of ``dtype`` fastest without rounding them.

    On a CPU that is bfloat16 only where it has instructions for it (AVX512_BF16 or AMX): 2.2 times as fast as float32
    on an AMD EPYC. Emulated with AVX2, bfloat16 took 4 times as long as float32.
    """
    return dtype if device.type != "cpu" or (dtype == torch.bfloat16 and CPU_HAS_BFLOAT16) else torch.float32


@as_written
def weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` on a quantized weight and an activation as it is, accumulated in float32.

    For so few rows that reading the weight is all that takes time. Up to `FEW_ROWS` are written as products and sums,
    which a compiler fuses into one kernel that reads the weight as it is; for more, `dequantized_linear` first writes
    the dequantized one.

    Args:
        x: ``[..., K]``, floating point.
        weight: ``[N, K]`` float8_e4m3fn or int8.
        weight_scale: ``[N, 1]`` (row-wise) or without dimensions, float32.
        bias: ``[N]`` or None.
        dtype: of the result.

    Returns:
        ``[..., N]`` in ``dtype``.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not (isinstance(rows.shape[0], int) and 0 < rows.shape[0] <= FEW_ROWS):
        return dequantized_linear(x, weight, weight_scale, bias, dtype)
    # as_strided changes nothing but that Inductor puts the rows into memory first; else it would compute what they are
    # made of, such as a SiLU, once for each output channel, which takes longer than reading the weight.
    rows = rows.as_strided(rows.shape, rows.stride()).float()
    values = weight.float()
    # A sum for each row, not one over three dimensions: sums over the same values share their loads.
    out = torch.stack([(values * row).sum(dim=-1) for row in rows.unbind()]) * weight_scale.reshape(-1)
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype)
    # Likewise stored once; else each kernel that reads it, a modulation, would round and shift it anew in each row.
    return out.as_strided(out.shape, out.stride()).view(*x.shape[:-1], weight.shape[0])


def decoded_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weight_only_linear` for a GPU whose compiler knows no E4M3."""
    return weight_only_linear(x, decoded_by_words(weight), weight_scale, bias, dtype)


def dequantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` on the values of a quantized weight, multiplied in `products_dtype`.

    Args:
        x: ``[..., K]``, floating point; cast to that dtype, as autocast would.
        weight, weight_scale, bias: as in `weight_only_linear`.

    Returns:
        ``[..., N]`` in ``dtype``.
    """
    products = products_dtype(weight.device, dtype)
    return linear_in(x, dequantize(weight, weight_scale, products), bias, products).to(dtype)


@as_written
def grouped_linear(x: Quantized, weight: Tensor, weight_scale: Tensor, offs: Tensor, dtype: torch.dtype) -> Tensor:
    """``torch.nn.functional.grouped_mm`` of tokens and their experts' matrices on FP8 operands.

    Args:
        x: ``[M, K]`` float8_e4m3fn, the tokens of the first expert first, with its scale, ``[M, 1]``.
        weight: ``[E, N, K]`` float8_e4m3fn, contiguous: a matrix ``[N, K]`` for each expert.
        weight_scale: ``[E, N, 1]`` float32.
        offs: ``[E]`` int32: where the tokens of each expert end.
        dtype: of the result.

    Returns:
        ``[M, N]`` in ``dtype``. Rows behind the last of ``offs`` are undefined, as they are with `grouped_mm`.
    """
    values, scale = x
    if not has_kernel(values.device.type):
        return grouped_then_scale(x, weight, weight_scale, offs, dtype)
    # It writes bfloat16 only:
    # https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/GroupedBlas.cpp
    return torch._scaled_grouped_mm(
        values,
        weight.mT,
        scale.view(-1),
        weight_scale.squeeze(-1),
        offs,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).to(dtype)


@as_written
def grouped_then_scale(x: Quantized, weight: Tensor, weight_scale: Tensor, offs: Tensor, dtype: torch.dtype) -> Tensor:
    """`grouped_linear` by a matmul of bfloat16, in which products of E4M3 are exact; for a CPU, and to check a kernel.

    The sums are rounded to bfloat16 once more, before the scales, because that is all that `grouped_mm` writes.
    """
    values, scale = x
    out = torch.nn.functional.grouped_mm(values.to(torch.bfloat16), weight.to(torch.bfloat16).mT, offs=offs)
    rows = torch.arange(values.shape[0], dtype=offs.dtype, device=offs.device)
    expert = torch.searchsorted(offs, rows, right=True).clamp(max=weight.shape[0] - 1)
    return (out.float() * scale * weight_scale.squeeze(-1)[expert]).to(dtype)


@as_written
def grouped_dequantized(x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, dtype: torch.dtype) -> Tensor:
    """`grouped_linear` with dequantized weights; the activation, ``[M, K]``, is not quantized."""
    values = dequantize(weight, weight_scale, torch.bfloat16).mT
    return torch.nn.functional.grouped_mm(x.to(torch.bfloat16), values, offs=offs).to(dtype)


def grouped_decoded(x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, dtype: torch.dtype) -> Tensor:
    """`grouped_dequantized` for a GPU whose compiler knows no E4M3."""
    return grouped_dequantized(x, decoded_by_words(weight), weight_scale, offs, dtype)


@as_written
def attention_in_float32(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``scaled_dot_product_attention`` on operands cast to float32, its result in ``dtype``; a mask may be of bools."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    attention = torch.nn.functional.scaled_dot_product_attention
    operands = query.float(), key.float(), value.float(), mask, dropout, causal
    return attention(*operands, scale=scale, enable_gqa=gqa).to(dtype)


@as_written
def linear_in(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias`` on a weight ``[N, K]`` in ``dtype``, to which the other operands are cast."""
    return torch.nn.functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
