"""`Fp8Weight`: a parameter that holds FP8 values and their scale, and acts as the weight that they stand for.

What `fp8_compile.quantize_` leaves in a module. The backend takes the FP8 values and the scale out of it; everything
else sees a weight of the original shape and dtype:

- an operator that reads it gets its values, dequantized;
- one that writes into it (PEFT's ``weight.data += delta``) writes into its values, which are then quantized again, into
  the same memory;
- one that only moves or copies it (``to``, ``clone``, ``detach``) moves or copies the FP8 bytes.

Views are copies: ``weight.t()`` or ``weight[0]`` is a dequantized tensor of its own, and writing into that does not
reach the weight (``weight[0] = x`` does).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from .. import numerics
from ..errors import Fp8WeightError

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What an `Fp8Weight` can stand for."""


class Identity:
    """What a weight remains when its bytes move to another device: the report is kept under it, weakly."""

    __slots__ = ("__weakref__",)


class Fp8Weight(Tensor):
    """A weight ``[N, K]`` in FP8.

    Args:
        qdata: ``[N, K]`` float8_e4m3fn, contiguous; or another `Fp8Weight`, whose memory the new parameter shares.
        scale: ``[N, 1]`` (row-wise) or without dimensions (tensor-wise), float32.
        dtype: of the weight that this one stands for.
        min_rows: what `quantize_` was told, if it was; the backend's own option counts otherwise.
        requires_grad: as in ``torch.nn.Parameter``.

    Raises:
        Fp8WeightError: the arguments do not fit together.
    """

    qdata: Tensor
    scale: Tensor
    min_rows: int | None
    identity: Identity

    # Every operator goes to __torch_dispatch__, and results are not wrapped again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        *,
        min_rows: int | None = None,
        identity: Identity | None = None,
        requires_grad: bool = False,
    ) -> Fp8Weight:
        if isinstance(qdata, Fp8Weight):  # as accelerate does when it brings an offloaded parameter back
            return _flagged(_alias(qdata), requires_grad, is_parameter=True)
        made = Tensor._make_wrapper_subclass(
            cls, qdata.shape, strides=qdata.stride(), dtype=dtype, device=qdata.device, requires_grad=requires_grad
        )
        made.qdata, made.scale, made.min_rows = qdata, _fitting_scale(qdata, scale, dtype), min_rows
        made.identity = Identity() if identity is None else identity
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        granularity: str = "row",
        *,
        min_rows: int | None = None,
        device: torch.device | None = None,
    ) -> Fp8Weight:
        """Quantize ``weight``, ``[N, K]``, floating point, as the backend would; on ``device``, or where it is.

        The memory needed there beside the result is that of a few rows.
        """
        qdata, scale = quantize_in_chunks(weight.detach(), granularity, device)
        return cls(qdata, scale, weight.dtype, min_rows=min_rows)

    @property
    def granularity(self) -> str:
        """ "row" or "tensor"."""
        return "row" if self.scale.dim() == 2 else "tensor"

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """What it takes in memory."""
        return self.qdata.nbytes + self.scale.nbytes

    def data_ptr(self) -> int:
        """Where its FP8 values are; a wrapper subclass has no address, and accelerate finds tied weights by theirs."""
        return self.qdata.data_ptr()

    def dequantize(self) -> Tensor:
        """The values that it stands for, in its dtype: ``[N, K]``."""
        return numerics.dequantize(self.qdata, self.scale, self.dtype)

    def assign_(self, values: Tensor) -> Fp8Weight:
        """Take over ``values``, ``[N, K]``: quantized, or as they are if they are FP8 of the same granularity.

        Raises:
            Fp8WeightError: the shapes differ, or ``values`` is FP8 without a scale.
        """
        if values.shape != self.shape:
            raise Fp8WeightError(f"values of shape {list(values.shape)} do not fit {self!r}")
        if isinstance(values, Fp8Weight) and values.granularity == self.granularity:
            qdata, scale = values.qdata, values.scale
        else:
            qdata, scale = quantize_in_chunks(values, self.granularity)
        self.qdata.copy_(qdata)
        self.scale.copy_(scale)
        return self

    # ``.data`` of a wrapper subclass would exchange the shape and the device, and leave the FP8 tensors as they are.
    @property
    def data(self) -> Fp8Weight:
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        new = value if isinstance(value, Fp8Weight) else Fp8Weight.quantize(value, self.granularity)
        if new.shape != self.shape:
            raise Fp8WeightError(f".data of shape {list(value.shape)} does not fit {self!r}")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.qdata, self.scale = new.qdata, new.scale

    def __setitem__(self, index: Any, value: Any) -> None:
        values = self.dequantize()
        values[index] = value
        self.assign_(values)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"Fp8Weight({list(self.shape)}, dtype={self.dtype}, granularity={self.granularity!r}, device={self.device})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8Weight:
        if id(self) not in memo:
            made = _like(self, copy.deepcopy(self.qdata, memo), copy.deepcopy(self.scale, memo))
            memo[id(self)] = _flagged(made, self.requires_grad, hasattr(self, "_is_param"))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As bytes: pickle alone, without torch.save, cannot read float8 back.
        inner = (self.qdata.view(torch.uint8), self.scale)
        return _rebuild, (*inner, self.dtype, self.min_rows, self.requires_grad, hasattr(self, "_is_param"))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["qdata", "scale"], (self.dtype, self.min_rows)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], meta: tuple[Any, ...], size: Any, stride: Any) -> Fp8Weight:
        return Fp8Weight(inner["qdata"], inner["scale"], meta[0], min_rows=meta[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MOVES:
            made = _MOVES[func](*args, **kwargs)
            if made is not None:
                return return_and_correct_aliasing(func, args, kwargs, made)  # type: ignore[no-untyped-call]
        return _on_values(func, args, kwargs)


class KeptWeight(torch.nn.Parameter):
    """A parameter that `fp8_compile.quantize_` saw and left as it was, so that the backend leaves it too.

    A class of its own, because Dynamo's guards tell classes apart: a graph in which such weights stay is never used
    for a model whose weights the backend shall convert.

    Attributes:
        reason: why it was left.
    """

    reason: str

    def __new__(cls, data: Tensor, requires_grad: bool = False, reason: str = "kept at load") -> KeptWeight:
        made: KeptWeight = super().__new__(cls, data, requires_grad)
        made.reason = reason
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptWeight:
        if id(self) not in memo:
            data = self.data.clone(memory_format=torch.preserve_format)
            memo[id(self)] = KeptWeight(data, self.requires_grad, self.reason)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return KeptWeight, (self.data, self.requires_grad, self.reason)


# Elements quantized at a time: what bounds the memory that quantizing a large weight takes, 10 bytes for each.
_CHUNK = 1 << 20


def quantize_in_chunks(weight: Tensor, granularity: str, device: torch.device | None = None) -> numerics.Quantized:
    """`numerics.quantize_rowwise` or ``quantize_tensorwise`` of ``weight``, ``[N, K]``, a few rows at a time.

    Args:
        device: where it is done; the rows go there as they are needed, those of a tensor-wise weight twice. None leaves
            them where they are.

    Raises:
        Fp8WeightError: ``weight`` is no floating-point matrix, or FP8 without a scale.
    """
    if isinstance(weight, Fp8Weight):
        weight = weight.dequantize()
    if weight.dim() != 2 or weight.dtype not in (*WEIGHT_DTYPES, torch.float64):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise Fp8WeightError(
            f"{dtype} values of shape {list(weight.shape)} are no weight: a matrix of bfloat16, float16 or float32 "
            "belongs here (FP8 values with their scale are an Fp8Weight)"
        )
    rows = max(1, weight.shape[0] if weight.is_meta else _CHUNK // max(1, weight.shape[1]))
    chunks = torch.split(weight, rows)
    device = weight.device if device is None else device
    qdata = torch.empty(weight.shape, dtype=numerics.FP8_DTYPE, device=device)
    if granularity == "tensor":
        if weight.numel() == 0:
            return numerics.quantize_tensorwise(weight.to(device))
        amax = torch.stack([chunk.to(device).abs().amax() for chunk in chunks]).amax()
        scale = numerics.quantize_with(amax, amax)[1]
        for made, chunk in zip(torch.split(qdata, rows), chunks, strict=True):
            made.copy_(numerics.quantize_with(chunk.to(device), amax)[0])
        return qdata, scale
    scale = torch.empty(weight.shape[0], 1, device=device)
    for values, scales, chunk in zip(torch.split(qdata, rows), torch.split(scale, rows), chunks, strict=True):
        made, made_scale = numerics.quantize_rowwise(chunk.to(device))
        values.copy_(made)
        scales.copy_(made_scale)
    return qdata, scale


def adopt(weight: Tensor) -> Fp8Weight | None:
    """torchao's ``Float8Tensor`` as an `Fp8Weight` in the same memory; None if ``weight`` is no such thing.

    Block-wise scales and other formats than E4M3 are not taken over.
    """
    if type(weight).__name__ != "Float8Tensor" or not type(weight).__module__.startswith("torchao."):
        return None
    qdata, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]
    if qdata.dim() != 2 or qdata.dtype != numerics.FP8_DTYPE or weight.dtype not in WEIGHT_DTYPES:
        return None
    if scale.numel() == 1:
        scale = scale.reshape(())
    return Fp8Weight(qdata, scale.float(), weight.dtype) if tuple(scale.shape) in ((), (qdata.shape[0], 1)) else None


def _fitting_scale(qdata: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if qdata.dtype != numerics.FP8_DTYPE or qdata.dim() != 2:
        raise Fp8WeightError(
            f"{qdata.dtype} values of shape {list(qdata.shape)}: a matrix of float8_e4m3fn belongs here; "
            "Fp8Weight.quantize makes one of other values"
        )
    if scale is None or scale.dtype != torch.float32 or tuple(scale.shape) not in ((), (qdata.shape[0], 1)):
        given = "none" if scale is None else f"{scale.dtype} of shape {list(scale.shape)}"
        raise Fp8WeightError(f"scale: float32 of shape [] or [{qdata.shape[0]}, 1] belongs here, not {given}")
    if dtype not in WEIGHT_DTYPES:
        raise Fp8WeightError(f"dtype={dtype}: an FP8 weight stands for one of {', '.join(map(str, WEIGHT_DTYPES))}")
    return scale


def _like(
    weight: Fp8Weight,
    qdata: Tensor,
    scale: Tensor,
    dtype: torch.dtype | None = None,
    identity: Identity | None = None,
) -> Fp8Weight:
    return Fp8Weight(qdata, scale, dtype or weight.dtype, min_rows=weight.min_rows, identity=identity)


def _flagged(made: Fp8Weight, requires_grad: bool, is_parameter: bool) -> Fp8Weight:
    if is_parameter:
        made._is_param = True
    made.requires_grad_(requires_grad)
    return made


def _rebuild(
    qdata: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    min_rows: int | None = None,
    requires_grad: bool = False,
    is_parameter: bool = False,
) -> Fp8Weight:
    """What pickles name; part of the format of files that ``torch.save`` writes."""
    return _flagged(
        Fp8Weight(qdata.view(numerics.FP8_DTYPE), scale, dtype, min_rows=min_rows), requires_grad, is_parameter
    )


torch.serialization.add_safe_globals([Fp8Weight, _rebuild])


# --- operators that move the bytes ---

_aten = torch.ops.aten


def _alias(weight: Fp8Weight) -> Fp8Weight:
    return _like(weight, weight.qdata, weight.scale, identity=weight.identity)


def _clone(weight: Fp8Weight, **_: Any) -> Fp8Weight:
    return _like(weight, weight.qdata.clone(), weight.scale.clone())


def _move(
    weight: Fp8Weight,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    memory_format: torch.memory_format | None = None,
    **where: Any,
) -> Fp8Weight | None:
    if dtype not in (None, *WEIGHT_DTYPES) or layout not in (None, torch.strided):
        return None
    qdata, scale = (_aten._to_copy.default(t, **where) for t in (weight.qdata, weight.scale))
    return _like(weight, qdata, scale, dtype, weight.identity)


def _empty_like(
    weight: Fp8Weight, *, dtype: torch.dtype | None = None, device: Any = None, pin_memory: bool = False, **_: Any
) -> Fp8Weight | None:
    if dtype not in (None, *WEIGHT_DTYPES):
        return None
    qdata, scale = (torch.empty_like(t, device=device, pin_memory=pin_memory) for t in (weight.qdata, weight.scale))
    return _like(weight, qdata, scale, dtype)


def _pin(weight: Fp8Weight, device: Any = None) -> Fp8Weight:
    return _like(weight, weight.qdata.pin_memory(), weight.scale.pin_memory(), identity=weight.identity)


_MOVES: dict[Any, Callable[..., Fp8Weight | None]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _move,
    _aten.empty_like.default: _empty_like,
    _aten._pin_memory.default: _pin,
}


# --- all others ---


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` on dequantized values, and take over what it wrote into them."""
    if func is _aten.copy_.default and isinstance(args[0], Fp8Weight):
        return args[0].assign_(args[1])
    if func is _aten.is_pinned.default:
        return func(args[0].qdata, *args[1:], **kwargs)
    if func is _aten.record_stream.default:
        for inner in (args[0].qdata, args[0].scale):
            func(inner, *args[1:], **kwargs)
        return None

    plain: dict[int, tuple[Fp8Weight, Tensor]] = {}

    def value(weight: Fp8Weight) -> Tensor:
        if id(weight) not in plain:
            plain[id(weight)] = weight, weight.dequantize()
        return plain[id(weight)][1]

    out = func(*tree_map_only(Fp8Weight, value, args), **tree_map_only(Fp8Weight, value, kwargs))
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        for weight in given if isinstance(given, (list, tuple)) else [given]:  # torch._foreach_add_
            if not isinstance(weight, Fp8Weight):
                continue
            written = plain[id(weight)][1]
            if written.shape != weight.shape or written.dtype != weight.dtype:
                raise Fp8WeightError(f"{func} would change the shape or the dtype of {weight!r}")
            weight.assign_(written)
    returned = {id(written): weight for weight, written in plain.values()}
    return tree_map_only(Tensor, lambda t: returned.get(id(t), t), out)
