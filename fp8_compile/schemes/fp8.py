"""Method "fp8": E4M3 weights, and activations quantized to E4M3 as they come."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import block_scales, numerics
from ..errors import OptionError, QuantizedWeightError
from ..options import check_choice, check_scale
from .few_rows import check_few_rows, check_few_rows_at_load, few_rows
from .scheme import ONES, Call, Scheme, Spec, chunk_rows, high_precision

GRANULARITIES = ("row", "tensor")
ACTIVATION_SCHEMES = ("dynamic", "static", "none")
BLOCK_SIZES = ((128, 128), (1, 128))
"""Of weights: those that a kernel multiplies by activations with a scale for each row and 128 columns."""

FP8_CAPABILITY = (8, 9)
"""Of the first NVIDIA GPUs with FP8 tensor cores, Ada Lovelace (https://developer.nvidia.com/cuda-gpus)."""

INPUT_SCALE = ".input_scale"
"""Where files have what stands for a unit of a layer's activation: ``PATH.input_scale`` beside ``PATH.weight``."""


@dataclass(frozen=True)
class Fp8(Scheme):
    """E4M3 values with float32 scales.

    Attributes:
        granularity: "row" gives each output channel of a weight and each token of an activation a scale of its own,
            "tensor" gives one to the whole. Of no meaning with ``weight_block_size``.
        activation_scheme: "dynamic" computes each activation's scale from its values; "static" has one for each layer,
            known before (`fp8_compile.calibrate`); "none" leaves activations as they are and multiplies in their dtype:
            half the memory of the weights, and no time won.
        input_scale: of "static": what stands for a unit of the layer's activation, as float32. Of one layer, so it
            belongs into ``layers``, or comes from ``activation_scales``.
        weight_block_size: one of `BLOCK_SIZES` gives a scale to each block of so many rows and columns of a weight, and
            to each row and 128 columns of an activation; see `block_scales`. None: see ``granularity``.
        min_m: a linear whose activation has fewer rows per sample (M: tokens, or 1 for a vector), whatever the batch,
            is not multiplied in FP8.
        small_m: what becomes of it: "weight-only" reads its FP8 weight and multiplies in float32, "keep" leaves it as
            it is, which is for compilation only.

    Raises:
        OptionError: a value is not valid.
    """

    method: ClassVar[str] = "fp8"
    granularity: str = "row"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | None = None
    min_m: int = 8
    small_m: str = "weight-only"
    input_scale: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("activation_scheme", self.activation_scheme, ACTIVATION_SCHEMES)
        if self.input_scale is not None:
            object.__setattr__(self, "input_scale", check_scale("input_scale", self.input_scale))
        if self.weight_block_size is not None:
            given: Any = self.weight_block_size
            size = next((size for size in BLOCK_SIZES if given in (size, list(size))), None)
            if size is None:
                valid = ", ".join(map(str, map(list, BLOCK_SIZES)))
                raise OptionError(f"weight_block_size={_listed(given)} is not valid; valid: {valid}, None")
            object.__setattr__(self, "weight_block_size", size)
            if self.granularity != "row":
                self.check_given({"granularity": self.granularity, "weight_block_size": size})
            if self.static:
                raise OptionError(
                    f"activation_scheme='static' and weight_block_size={_listed(size)} exclude each other: activations "
                    "have a scale for each row and 128 columns there"
                )
        check_few_rows(self.min_m, self.small_m)

    @classmethod
    def check_given(cls, options: Mapping[str, Any]) -> None:
        granularity, block = options.get("granularity"), options.get("weight_block_size")
        if granularity is not None and block is not None:
            raise OptionError(
                f"granularity={granularity!r} and weight_block_size={_listed(block)} exclude each other: blocks have "
                "scales of their own; leave one of the two out"
            )
        scale, activations = options.get("input_scale"), options.get("activation_scheme")
        if scale is not None and activations != "static":
            raise OptionError(f"input_scale={scale!r} is of use with activation_scheme='static' only")

    @property
    def static(self) -> bool:
        return self.activation_scheme == "static"

    def called_with(self, options: Mapping[str, Any]) -> Scheme:
        # No call makes dynamic constants static ones; `uncalibrated="dynamic"` leaves such beside static ones.
        own = {name: value for name, value in options.items() if (name, value) != ("activation_scheme", "static")}
        return super().called_with(own)

    @property
    def call_options(self) -> tuple[str, ...]:  # type: ignore[override]
        """With static scales the weight has constants that are of no use without them, and the other way round."""
        return ("min_m", "small_m") if self.static else ("min_m", "small_m", "activation_scheme")

    @property
    def input_scale_missing(self) -> bool:
        return self.static and self.input_scale is None

    def with_input_scale(self, scale: float | None) -> Scheme:
        return replace(self, activation_scheme="dynamic") if scale is None else replace(self, input_scale=scale)

    def constants_key(self) -> Hashable:
        return super().constants_key(), self.input_scale if self.static else None

    @property
    def label(self) -> str:
        if self.weight_block_size is not None:
            return BLOCKS[self.weight_block_size].name
        return f"fp8-{self.granularity}-static" if self.static else f"fp8-{self.granularity}"

    @property
    def on_cpu(self) -> str:
        if numerics.CPU_HAS_BFLOAT16 and self.weight_block_size is None:
            return "FP8 values are multiplied in bfloat16, for which this CPU has instructions"
        return "FP8 values are multiplied in float32"

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        scale: tuple[int, ...] = (out_features, 1) if self.granularity == "row" else ()
        if self.weight_block_size is not None:
            scale = _blocks(out_features, in_features, self.weight_block_size)
        made = {
            "qdata": Spec((out_features, in_features), numerics.FP8_DTYPE),
            "scale": Spec(scale, torch.float32),
        }
        if self.static:
            made["input_scale"] = Spec((), torch.float32)
            if self.granularity == "row":
                made["folded_scale"] = made["scale"]
        return made

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        if self.weight_block_size is not None:
            return block_scales.quantize_weight(weight, self.weight_block_size[0])
        if self.granularity == "row":
            return self._completed(*numerics.quantize_weight_rowwise(weight))
        return self._completed(*numerics.quantize_weight_tensorwise(weight))

    def _completed(self, qdata: Tensor, scale: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
        """The constants of a weight, those of static activations included.

        Args:
            given: the input scale, if a file has it.
        """
        if not self.static:
            return qdata, scale
        if given is None and self.input_scale is None:
            raise OptionError("activation_scheme='static' needs an input_scale")
        input_scale = scale.new_full((), self.input_scale) if given is None else given  # type: ignore[arg-type]
        # Multiplied here once, in one order for all entrances, so that the kernel multiplies by one scale less.
        return (qdata, scale, input_scale, *([scale * input_scale] if self.granularity == "row" else []))

    @property
    def rows_together(self) -> int:
        return 1 if self.weight_block_size is None else self.weight_block_size[0]

    def quantize_in_chunks(self, weight: Tensor, device: torch.device | None = None) -> tuple[Tensor, ...]:
        if self.static:  # what belongs to activations has no rows that could be taken in chunks
            return self._completed(*replace(self, activation_scheme="dynamic").quantize_in_chunks(weight, device))
        device = weight.device if device is None else device
        if device.type == "cpu" and self.granularity == "row" and self.weight_block_size is None:
            qdata, scale = (torch.empty(s.shape, dtype=s.dtype) for s in self.specs(*weight.shape).values())
            numerics.quantize_weight_rowwise_into(qdata, scale, weight, chunk_rows(weight, device))
            return qdata, scale
        if self.granularity == "row" or weight.numel() == 0:
            return super().quantize_in_chunks(weight, device)
        chunks = torch.split(weight, chunk_rows(weight, device))
        amax = torch.stack([chunk.to(device).abs().amax() for chunk in chunks]).amax()
        parts = (numerics.quantize_weight_with(chunk.to(device), amax)[0] for chunk in chunks)
        qdata = torch.empty(weight.shape, dtype=numerics.FP8_DTYPE, device=device)
        for whole, part in zip(torch.split(qdata, chunk_rows(weight, device)), parts, strict=True):
            whole.copy_(part)
        return qdata, numerics.quantize_weight_with(amax, amax)[1]

    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        qdata, scale, *_ = constants
        if self.weight_block_size is not None:
            return block_scales.dequantize(qdata, scale, self.weight_block_size[0], dtype)
        return numerics.dequantize(qdata, scale, dtype)

    def for_call(self, m: float, device: torch.device) -> tuple[Call, ...]:
        blocks = self.weight_block_size
        weight_only = WEIGHT_ONLY if blocks is None else WEIGHT_ONLY_BLOCKS
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            decoded = DECODED if blocks is None else DECODED_BLOCKS
            return few_rows(m, self.min_m, self.small_m, decoded) or (decoded,)
        if self.activation_scheme == "none":
            # Also above min_m, where the weight is read once for so few rows that nothing else takes time.
            more = DEQUANTIZED if blocks is None else DEQUANTIZED_BLOCKS
            some = (weight_only,) if m <= numerics.FEW_ROWS else (more,)
            return few_rows(m, self.min_m, self.small_m, weight_only) or some
        if m == math.inf:  # the meta function of _scaled_mm compares it
            return (high_precision("number of rows is known only at run time"),)
        enough: tuple[Call, ...]
        if blocks is not None:
            enough = (BLOCKS[blocks], DEQUANTIZED_BLOCKS)
        elif self.static:
            enough = (STATIC_ROWWISE, STATIC_UNFUSED) if self.granularity == "row" else (STATIC_TENSORWISE,)
        else:
            enough = (ROWWISE, ROWWISE_UNFUSED_SCALES) if self.granularity == "row" else (TENSORWISE,)
        return few_rows(m, self.min_m, self.small_m, weight_only) or enough

    @property
    def no_experts(self) -> str | None:
        if self.static or self.granularity != "row" or self.weight_block_size is not None:
            return f"experts: with a scale per row and dynamic activations only, not {self.label}"
        return None

    def for_experts(self, m: float, device: torch.device) -> tuple[Call, ...]:
        # Whatever min_m: a token more or less for one expert shall not decide how all run.
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            return (EXPERTS_DECODED,)
        if self.activation_scheme == "none":
            return (EXPERTS_DEQUANTIZED,)
        return (high_precision("number of rows is known only at run time"),) if m == math.inf else (EXPERTS,)

    def check_at_load(self) -> None:
        check_few_rows_at_load(self.small_m)

    def reason(self, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
        # cuBLASLt and CUTLASS both ask for 16-byte aligned FP8 rows; kept on every device so that decisions do not
        # differ, and for every M: at load time, when it is not known yet, the same weights become FP8.
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if features % 16:
                return f"{name} {features} is not a multiple of 16"
        return None

    def suffixes(self) -> tuple[str | None, ...]:
        if not self.static:
            return super().suffixes()
        return ("", "_scale", INPUT_SCALE, *([None] if self.granularity == "row" else []))

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Scheme, tuple[Tensor, ...]]:
        qdata, scale = tensors[""], tensors["_scale"]
        if qdata.dim() == 3 and self.no_experts is None:
            if scale.shape != (*qdata.shape[:2], 1):
                raise QuantizedWeightError(
                    f"has shape {list(scale.shape)}; the scale of experts of shape {list(qdata.shape)} has one of "
                    f"{[*qdata.shape[:2], 1]}",
                    "_scale",
                )
            scheme, constants = self.read({"": qdata.flatten(0, 1), "_scale": scale.flatten(0, 1)})
            return scheme, tuple(constant.view(*qdata.shape[:2], -1) for constant in constants)
        if qdata.dim() != 2:
            raise QuantizedWeightError(f"has FP8 values of shape {list(qdata.shape)}, which are no matrix")
        n, k = qdata.shape
        granularity, block = "row", None
        if self.weight_block_size is not None and scale.shape == _blocks(n, k, self.weight_block_size):
            fitting, block = scale, self.weight_block_size
        elif scale.numel() == 1 and n != 1:
            granularity, fitting = "tensor", scale.reshape(())
        elif scale.numel() == n and scale.dim() <= 2 and scale.shape[:1] in ((n,), ()):
            fitting = scale.reshape(n, 1)
        else:
            shapes = {_blocks(n, k, size): size for size in BLOCK_SIZES}
            if tuple(scale.shape) not in shapes:
                of_blocks = [f"{list(shape)} for blocks of {list(size)}" for shape, size in shapes.items()]
                raise QuantizedWeightError(
                    f"has shape {list(scale.shape)}; a scale for values of shape {list(qdata.shape)} has one element, "
                    f"[{n}, 1], or {', or '.join(of_blocks)}",
                    "_scale",
                )
            fitting, block = scale, next(size for shape, size in shapes.items() if shape == scale.shape)
        fitting = fitting.float()
        if fitting.device.type != "meta":
            if not (fitting.isfinite() & (fitting > 0)).all():
                raise QuantizedWeightError("holds a scale that is NaN, infinite, zero or negative", "_scale")
            if not (fitting <= numerics.LARGEST_SCALE).all():
                raise QuantizedWeightError(
                    f"holds a scale above {numerics.LARGEST_SCALE:.4g}, whose values are infinite", "_scale"
                )
        if qdata.device.type != "meta" and qdata.dtype == numerics.FP8_DTYPE:
            # NaN is 0x7F and 0xFF. A few rows at a time, as bytes: a mask of all would be as large as the values.
            chunks = torch.split(qdata.view(torch.uint8), chunk_rows(qdata, qdata.device))
            if any((chunk & 0x7F == 0x7F).any() for chunk in chunks):
                raise QuantizedWeightError("holds NaN")
        scheme = replace(
            self,
            activation_scheme="dynamic" if self.static else self.activation_scheme,
            granularity=granularity,
            weight_block_size=block,
        )
        given = tensors.get(INPUT_SCALE)
        if given is None or block is not None:
            return scheme, (qdata.contiguous(), fitting.contiguous())
        given = given.float().reshape(-1)
        if not given.is_meta and not ((given > 0) & (given <= numerics.LARGEST_SCALE)).all():
            raise QuantizedWeightError("is an input scale that is NaN, infinite, zero or negative", INPUT_SCALE)
        if given.numel() == 0 or (not given.is_meta and not (given == given[0]).all()):
            raise QuantizedWeightError(f"holds {given.numel()} different input scales; expected one", INPUT_SCALE)
        value = None if given.is_meta else float(given[0])
        scheme = replace(scheme, activation_scheme="static", input_scale=value)
        return scheme, scheme._completed(qdata.contiguous(), fitting.contiguous(), given[0].clone())


def _blocks(out_features: int, in_features: int, size: Sequence[int]) -> tuple[int, int]:
    """How many blocks of ``size`` a weight has, down and across; those at its edges may be smaller."""
    return -(-out_features // size[0]), -(-in_features // size[1])


def _listed(block: Any) -> str:
    """As it is written in options: JSON has no tuples."""
    return repr(list(block) if isinstance(block, tuple) else block)


ROWWISE = Call("fp8-row", numerics.scaled_linear, numerics.quantize_rowwise)
# For devices that refuse row-wise scales for a shape, or altogether.
ROWWISE_UNFUSED_SCALES = Call("fp8-row-unfused-scales", numerics.linear_then_scale, numerics.quantize_rowwise)
TENSORWISE = Call("fp8-tensor", numerics.scaled_linear, numerics.quantize_tensorwise, mixes_samples=True)
STATIC_ROWWISE = Call(
    "fp8-row-static",
    numerics.scaled_linear,
    numerics.quantize_static_rowwise,
    takes=("input_scale", ONES),
    operands=("qdata", "folded_scale"),
)
STATIC_UNFUSED = replace(STATIC_ROWWISE, name="fp8-row-static-unfused-scales", linear=numerics.linear_then_scale)
STATIC_TENSORWISE = Call(
    "fp8-tensor-static",
    numerics.scaled_linear,
    numerics.quantize_static_tensorwise,
    takes=("input_scale",),
    operands=("qdata", "scale"),
)
# Static activations or not: few rows need none of what belongs to them.
WEIGHT_ONLY = Call("fp8-weight-only", numerics.weight_only_linear, operands=("qdata", "scale"))
# The same for more rows, by its own name in a graph and by the same name in a report.
DEQUANTIZED = Call("fp8-weight-only", numerics.dequantized_linear)
BLOCKS = {
    size: Call(
        f"fp8-{size[0]}x{size[1]}",
        block_scales.blockwise_linear,
        block_scales.quantize_blockwise,
        reference=block_scales.reference,
    )
    for size in BLOCK_SIZES
}
# For GPUs without FP8 tensor cores, for any number of rows.
_NO_CORES = "weight-only: no FP8 cores; method='int8' is the fast one on this GPU"
DECODED = Call("fp8-weight-only", numerics.decoded_linear, operands=("qdata", "scale"), reason=_NO_CORES)
DECODED_BLOCKS = Call("fp8-weight-only", block_scales.decoded_linear, reason=_NO_CORES)
WEIGHT_ONLY_BLOCKS = Call("fp8-weight-only", block_scales.blockwise_weight_only_linear)
# The matrices of experts. The kernel is one of Hopper's, and young, so it is checked.
EXPERTS = Call("fp8-row", numerics.grouped_linear, numerics.quantize_rowwise, reference=numerics.grouped_then_scale)
EXPERTS_DEQUANTIZED = Call("fp8-weight-only", numerics.grouped_dequantized)
EXPERTS_DECODED = Call("fp8-weight-only", numerics.grouped_decoded, reason=_NO_CORES)
# For devices without a kernel for blocks: all but Hopper.
DEQUANTIZED_BLOCKS = Call("fp8-weight-only", block_scales.dequantized_linear)
