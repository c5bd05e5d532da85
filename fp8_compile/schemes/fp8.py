"""Method "fp8": E4M3 weights, and activations quantized to E4M3 as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import numerics
from ..errors import OptionError, QuantizedWeightError
from ..options import check_choice
from .few_rows import check_few_rows, check_few_rows_at_load, few_rows
from .scheme import Call, Scheme, Spec, chunk_rows, high_precision

GRANULARITIES = ("row", "tensor")

# That of the largest bfloat16; what a larger one stands for may be infinite.
LARGEST_SCALE = torch.finfo(torch.bfloat16).max / numerics.FP8_MAX


@dataclass(frozen=True)
class Fp8(Scheme):
    """E4M3 values with float32 scales.

    Attributes:
        granularity: "row" gives each output channel of a weight and each token of an activation a scale of its own,
            "tensor" gives one to the whole.
        activation_scheme: "dynamic" computes each activation's scale from its values; "none" leaves activations as they
            are and multiplies in their dtype: half the memory of the weights, and no time won.
        weight_block_size: None; block-wise scales are not available yet.
        min_m: a linear whose activation has fewer rows (M: tokens of the whole batch) is not multiplied in FP8.
        small_m: what becomes of it: "weight-only" reads its FP8 weight and multiplies in float32, "keep" leaves it as
            it is, which is for compilation only.

    Raises:
        OptionError: a value is not valid.
    """

    method: ClassVar[str] = "fp8"
    call_options: ClassVar[tuple[str, ...]] = ("min_m", "small_m", "activation_scheme")

    granularity: str = "row"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    min_m: int = 8
    small_m: str = "weight-only"

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, GRANULARITIES)
        if self.activation_scheme == "static":
            raise OptionError("activation_scheme='static' is not available yet; use 'dynamic' or 'none'")
        check_choice("activation_scheme", self.activation_scheme, ("dynamic", "none"))
        if self.weight_block_size is not None:
            raise OptionError(
                f"weight_block_size={self.weight_block_size!r}: block-wise scales are not available yet; use None"
            )
        check_few_rows(self.min_m, self.small_m)

    @property
    def label(self) -> str:
        return f"fp8-{self.granularity}"

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        scale = (out_features, 1) if self.granularity == "row" else ()
        return {
            "qdata": Spec((out_features, in_features), numerics.FP8_DTYPE),
            "scale": Spec(scale, torch.float32),
        }

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        if self.granularity == "row":
            return numerics.quantize_weight_rowwise(weight)
        return numerics.quantize_weight_tensorwise(weight)

    def quantize_in_chunks(self, weight: Tensor, device: torch.device | None = None) -> tuple[Tensor, ...]:
        if self.granularity == "row" or weight.numel() == 0:
            return super().quantize_in_chunks(weight, device)
        chunks = torch.split(weight, chunk_rows(weight))
        device = weight.device if device is None else device
        amax = torch.stack([chunk.to(device).abs().amax() for chunk in chunks]).amax()
        parts = (numerics.quantize_weight_with(chunk.to(device), amax)[0] for chunk in chunks)
        qdata = torch.empty(weight.shape, dtype=numerics.FP8_DTYPE, device=device)
        for whole, part in zip(torch.split(qdata, chunk_rows(weight)), parts, strict=True):
            whole.copy_(part)
        return qdata, numerics.quantize_weight_with(amax, amax)[1]

    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        qdata, scale = constants
        return numerics.dequantize(qdata, scale, dtype)

    def for_call(self, m: float, device: torch.device) -> tuple[Call, ...]:
        if self.activation_scheme == "none":
            # Also above min_m, where the weight is read once for so few rows that nothing else takes time.
            some = (WEIGHT_ONLY,) if m <= numerics.FEW_ROWS else (DEQUANTIZED,)
            return few_rows(m, self.min_m, self.small_m, WEIGHT_ONLY) or some
        if m == math.inf:  # the meta function of _scaled_mm compares it
            return (high_precision("number of rows is known only at run time"),)
        enough = (ROWWISE, ROWWISE_UNFUSED_SCALES) if self.granularity == "row" else (TENSORWISE,)
        return few_rows(m, self.min_m, self.small_m, WEIGHT_ONLY) or enough

    def check_at_load(self) -> None:
        check_few_rows_at_load(self.small_m)

    def reason(self, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
        # cuBLASLt and CUTLASS both ask for 16-byte aligned FP8 rows; kept on every device so that decisions do not
        # differ, and for every M: at load time, when it is not known yet, the same weights become FP8.
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if features % 16:
                return f"{name} {features} is not a multiple of 16"
        return None

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Scheme, tuple[Tensor, ...]]:
        qdata, scale = (tensors[suffix] for suffix in self.suffixes())
        if qdata.dim() != 2:
            raise QuantizedWeightError(f"has FP8 values of shape {list(qdata.shape)}, which are no matrix")
        rows = qdata.shape[0]
        if scale.numel() == 1 and rows != 1:
            granularity, fitting = "tensor", scale.reshape(())
        elif scale.numel() == rows and scale.dim() <= 2 and scale.shape[:1] in ((rows,), ()):
            granularity, fitting = "row", scale.reshape(rows, 1)
        else:
            raise QuantizedWeightError(
                f"has shape {list(scale.shape)}; a scale for values of shape {list(qdata.shape)} has one element, or "
                f"[{rows}, 1] (block-wise scales cannot be read yet)",
                "_scale",
            )
        fitting = fitting.float()
        if fitting.device.type != "meta":
            if not (fitting.isfinite() & (fitting > 0)).all():
                raise QuantizedWeightError("holds a scale that is NaN, infinite, zero or negative", "_scale")
            if not (fitting <= LARGEST_SCALE).all():
                raise QuantizedWeightError(
                    f"holds a scale above {LARGEST_SCALE:.4g}, whose values are infinite", "_scale"
                )
        if qdata.device.type != "meta" and qdata.dtype == numerics.FP8_DTYPE:
            # NaN is 0x7F and 0xFF. A few rows at a time, as bytes: a mask of all would be as large as the values.
            chunks = torch.split(qdata.view(torch.uint8), chunk_rows(qdata))
            if any((chunk & 0x7F == 0x7F).any() for chunk in chunks):
                raise QuantizedWeightError("holds NaN")
        return replace(self, granularity=granularity), (qdata.contiguous(), fitting.contiguous())


ROWWISE = Call("fp8-row", numerics.scaled_linear, numerics.quantize_rowwise)
# For devices that refuse row-wise scales for a shape, or altogether.
ROWWISE_UNFUSED_SCALES = Call("fp8-row-unfused-scales", numerics.linear_then_scale, numerics.quantize_rowwise)
TENSORWISE = Call("fp8-tensor", numerics.scaled_linear, numerics.quantize_tensorwise)
WEIGHT_ONLY = Call("fp8-weight-only", numerics.weight_only_linear)
# The same for more rows, by its own name in a graph and by the same name in a report.
DEQUANTIZED = Call("fp8-weight-only", numerics.dequantized_linear)
