"""FP8 with a scale for each block: 128 columns of one row, or 128 x 128 values.

As in DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3.2): activations have a scale for each row and 128
columns, weights one for each 128 x 128 values or, finer, one for each row and 128 columns. What does not divide is
padded with zeros, which leaves traces in the shapes of scales only: ``ceil(N / rows)`` by ``ceil(K / 128)``.

The products of a block must be scaled before they are added to those of the next. One kernel does that, cuBLASLt's on
Hopper. It is called by an operator of this package, `block_scaled_mm`, and not by ``aten._scaled_mm_v2`` in the graph:

- Inductor lowers the latter by itself (torch 2.13, ``tuned_scaled_mm_v2``), under max-autotune to Triton templates that
  were silently wrong for blocks (https://github.com/pytorch/pytorch/issues/195751), and else to ``_scaled_mm``, whose
  check of shapes does not know the padding of the scales that the kernel needs.
- Its meta function computes the number of blocks as ``K // 128``, so shapes that do not divide cannot be traced.

Compilers know nothing of an operator of ours: they call it as it is, with the strides that were traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from . import numerics
from .numerics import Quantized

COLUMNS = 128
"""The columns of a block."""

# Scales for each row lie M apart, since torch has no other way to say how far. TransformerEngine gives cuBLASLt only
# multiples of 4 (https://github.com/NVIDIA/TransformerEngine, tests/pytorch/references, CuBLASScaleMunger), as we do.
_ALIGNED = 4


def _blocks(values: Tensor, rows: int) -> Tensor:
    """``[R, K]`` as ``[ceil(R / rows), rows, ceil(K / 128), 128]``, padded with zeros."""
    below, right = -values.shape[0] % rows, -values.shape[1] % COLUMNS
    if below or right:
        values = functional.pad(values, (0, right, 0, below))
    height, width = values.shape
    return values.reshape(height // rows, rows, width // COLUMNS, COLUMNS)


def quantize_weight(weight: Tensor, rows: int) -> Quantized:
    """Quantize ``weight``, floating point, with a scale for each block.

    Args:
        weight: ``[N, K]``.
        rows: of a block.

    Returns:
        ``[N, K]`` float8_e4m3fn, contiguous, and ``[ceil(N / rows), ceil(K / 128)]`` float32.
    """
    n, k = weight.shape
    blocks = _blocks(weight, rows)
    values, scale = numerics.quantize_weight_with(blocks, blocks.abs().amax(dim=(-3, -1), keepdim=True))
    return values.flatten(-2).flatten(0, 1)[:n, :k].contiguous(), scale.flatten(-2).flatten(0, 1)


def quantize_blockwise(x: Tensor) -> Quantized:
    """Quantize an activation with a scale for each row and 128 columns.

    Args:
        x: ``[..., K]``, floating point.

    Returns:
        ``[..., K]`` float8_e4m3fn, and ``[ceil(K / 128), M]`` float32, where M are the rows of all leading dimensions:
        in the order in which the kernel reads them, so that they are written once for all linears that do. Both are
        contiguous.
    """
    k = x.shape[-1]
    padding = -k % COLUMNS
    padded = functional.pad(x, (0, padding)) if padding else x
    values, scale = numerics.quantize_rowwise(padded.reshape(*x.shape[:-1], (k + padding) // COLUMNS, COLUMNS))
    values, scale = values.flatten(-2), scale.squeeze(-1)
    if padding:
        scaled = x.float() * _widened(1 / scale, k)
        values = scaled.to(values.dtype, memory_format=torch.contiguous_format)
    return values, scale.reshape(-1, scale.shape[-1]).t().contiguous()


def dequantize(values: Tensor, scale: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The matrix ``[R, K]`` that ``values`` and ``scale``, ``[ceil(R / rows), ceil(K / 128)]``, stand for."""
    height, width = values.shape
    wide = _widened(scale, width).unsqueeze(1).expand(-1, rows, -1).flatten(0, 1)
    return numerics.dequantize(values, wide[:height], dtype)


def _widened(scale: Tensor, k: int) -> Tensor:
    """``[..., ceil(K / 128)]`` as ``[..., K]``."""
    wide = scale.unsqueeze(-1).expand(*scale.shape, COLUMNS).flatten(-2)
    if k % COLUMNS == 0:
        return wide
    # as_strided changes nothing but that Inductor puts these into memory first. Else, on a CPU, it cuts a loop over K
    # into blocks and forgets the rest: https://github.com/pytorch/pytorch/issues/195582
    wide = wide.contiguous()
    return wide.as_strided(wide.shape, wide.stride())[..., :k]


def block_rows(weight: Tensor, scale: Tensor) -> int:
    """The rows of a block, 1 or 128, of ``weight``, ``[N, K]``, by the shape of its scales."""
    return 1 if scale.shape[0] == weight.shape[0] else COLUMNS


def blockwise_linear(
    x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` on FP8 operands, accumulated in float32; on a GPU rounded to bfloat16 before the bias.

    Args:
        x: as `quantize_blockwise` makes it.
        weight, weight_scale: as `quantize_weight` makes them.
        bias: ``[N]`` or None.
        dtype: of the result.

    Returns:
        ``[..., N]`` in ``dtype``.
    """
    values, scale = x
    out_shape = (*values.shape[:-1], weight.shape[0])
    if statically_known_true(values.numel() == 0):  # not every kernel takes zero rows
        return torch.empty(out_shape, dtype=dtype, device=values.device)
    if not numerics.has_kernel(values.device.type):
        return reference(x, weight, weight_scale, bias, dtype)
    rows = block_rows(weight, weight_scale)
    out: Tensor = MATMUL(
        values.reshape(-1, values.shape[-1]),
        scale,
        weight,
        _for_kernel(weight_scale, rows),
        rows,
        torch.bfloat16,
    )
    return (out if bias is None else out + bias.float()).to(dtype).view(out_shape)


def _for_kernel(weight_scale: Tensor, rows: int) -> Tensor:
    """The scales of a weight in the order in which the kernel reads them."""
    if rows == 1:
        return weight_scale.t().contiguous()
    padding = -weight_scale.shape[1] % _ALIGNED
    return functional.pad(weight_scale, (0, padding)) if padding else weight_scale


@numerics.as_written
def reference(x: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `blockwise_linear` computes, of the dequantized operands in float32."""
    values, scale = x
    left = dequantize(values.reshape(-1, values.shape[-1]), scale.t(), 1, torch.float32)
    matrix = dequantize(weight, weight_scale, block_rows(weight, weight_scale), torch.float32)
    out = functional.linear(left, matrix, None if bias is None else bias.float())
    return out.to(dtype).view(*values.shape[:-1], -1)


def blockwise_weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `numerics.weight_only_linear`, on a weight with a scale for each block."""
    matrix = dequantize(weight, weight_scale, block_rows(weight, weight_scale), torch.float32)
    one = torch.ones((), dtype=torch.float32, device=weight.device)
    return numerics.weight_only_linear(x, matrix, one, bias, dtype)


def decoded_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `numerics.decoded_linear`, on a weight with a scale for each block."""
    return blockwise_weight_only_linear(x, numerics.decoded_by_words(weight), weight_scale, bias, dtype)


def dequantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `numerics.dequantized_linear`: for many rows where no kernel takes blocks."""
    products = numerics.products_dtype(weight.device, dtype)
    matrix = dequantize(weight, weight_scale, block_rows(weight, weight_scale), products)
    return numerics.linear_in(x, matrix, bias, products).to(dtype)


# --- the operator ---

_library: Any = torch.library.Library("fp8_compile", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "block_scaled_mm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, int rows, ScalarType dtype) "
    "-> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


def _on_cpu(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T`` in ``dtype``; the reference of the other implementation.

    Args:
        x: ``[M, K]`` float8_e4m3fn.
        x_scale: ``[ceil(K / 128), M]`` float32.
        weight: ``[N, K]`` float8_e4m3fn.
        weight_scale: float32; ``[ceil(K / 128), N]`` if ``rows`` is 1, and ``[ceil(N / 128), L]`` if it is 128, where L
            is the multiple of 4 that is at least ``ceil(K / 128)``.

    All are contiguous.
    """
    of_weight = weight_scale.t() if rows == 1 else weight_scale[:, : x_scale.shape[0]]
    with torch.autocast("cpu", enabled=False):  # which would cast the operands
        left = dequantize(x, x_scale.t(), 1, torch.float32)
        return (left @ dequantize(weight, of_weight, rows, torch.float32).t()).to(dtype)


def _on_cuda(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The same by cuBLASLt 12.9 or later, on compute capability 9.

    Where each scale must lie is written down, and checked, in
    https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/native/cuda/ScaledBlas.cpp

    Raises:
        NotImplementedError: the device is another, or cuBLASLt too old.
    """
    m = x.shape[0]
    padding = -m % _ALIGNED
    if padding:
        x = functional.pad(x.view(torch.uint8), (0, 0, 0, padding)).view(x.dtype)
        x_scale = functional.pad(x_scale, (0, padding))
    kind = functional.ScalingType
    return functional.scaled_mm(
        x,
        weight.t(),
        x_scale.t(),
        kind.BlockWise1x128,
        weight_scale.t(),
        kind.BlockWise1x128 if rows == 1 else kind.BlockWise128x128,
        output_dtype=dtype,
        use_fast_accum=False,
    )[:m]


def _fake(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


_library.impl("block_scaled_mm", _on_cpu, "CPU")
_library.impl("block_scaled_mm", _on_cuda, "CUDA")
torch.library.register_fake("fp8_compile::block_scaled_mm", _fake, lib=_library)

MATMUL = torch.ops.fp8_compile.block_scaled_mm.default
