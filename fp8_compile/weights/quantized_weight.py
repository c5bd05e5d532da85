"""`QuantizedWeight`: a parameter that holds quantized values, and acts as the weight that they stand for.

What `fp8_compile.quantize_` leaves in a module. It carries its scheme; the backend takes the constants out of it, and
everything else sees a weight of the original shape and dtype:

- an operator that reads it gets its values, dequantized;
- one that writes into it (PEFT's ``weight.data += delta``) writes into its values, which are then quantized again, into
  the same memory;
- one that only moves or copies it (``to``, ``clone``, ``detach``) moves or copies the constants.

Views are copies: ``weight.t()`` or ``weight[0]`` is a dequantized tensor of its own, and writing into that does not
reach the weight (``weight[0] = x`` does).
"""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from ..errors import QuantizedWeightError
from ..schemes import Scheme, scheme_named
from .sharded import is_being_sharded, written_by_collective

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a `QuantizedWeight` can stand for."""


class Identity:
    """What a weight remains when its bytes move to another device: the report is kept under it, weakly."""

    __slots__ = ("__weakref__",)


class QuantizedWeight(Tensor):
    """A weight ``[N, K]``, quantized; or the matrices of experts, ``[E, K, N]``, as diffusers stacks them.

    Attributes:
        constants: in the order of ``scheme.specs``; each is also an attribute by the name that it has there, for
            example ``qdata`` and ``scale``. Of a stack, those of each matrix ``[N, K]``, stacked.

    Args:
        scheme: what the constants are and mean; or another `QuantizedWeight`, whose memory the new parameter shares.
        constants: those of the scheme, in its order.
        dtype: of the weight that this one stands for.
        requires_grad: as in ``torch.nn.Parameter``.

    Raises:
        QuantizedWeightError: the arguments do not fit together.
    """

    scheme: Scheme
    constants: tuple[Tensor, ...]
    identity: Identity
    _names: list[str]

    # Every operator goes to __torch_dispatch__, and results are not wrapped again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        scheme: Scheme | QuantizedWeight,
        constants: Sequence[Tensor] = (),
        dtype: torch.dtype = torch.bfloat16,
        *,
        identity: Identity | None = None,
        requires_grad: bool = False,
    ) -> QuantizedWeight:
        if isinstance(scheme, QuantizedWeight):  # as accelerate does when it brings an offloaded parameter back
            return _flagged(_alias(scheme), requires_grad, is_parameter=True)
        shape = _checked_shape(scheme, constants, dtype)
        with torch.inference_mode(False):  # an inference tensor could not be moved or written outside of that mode
            made = Tensor._make_wrapper_subclass(
                cls,
                shape,
                strides=_strides(shape),
                dtype=dtype,
                device=constants[0].device,
                requires_grad=requires_grad,
            )
        torch._C._set_throw_on_mutable_data_ptr(made)  # or else who reads its memory, which is none, reads address 0
        made._hold(scheme, constants)
        made.identity = Identity() if identity is None else identity
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def quantize(cls, weight: Tensor, scheme: Scheme, device: torch.device | None = None) -> QuantizedWeight:
        """Quantize ``weight``, ``[N, K]`` or ``[E, K, N]``, as the backend would; on ``device``, or where it is.

        The memory needed there beside the result is that of a few rows, or of one expert.

        Raises:
            QuantizedWeightError: ``weight`` is no floating-point matrix, nor a stack of them, or FP8 without a scale.
        """
        return cls(scheme, _quantize(scheme, weight, device), weight.dtype)

    def _hold(self, scheme: Scheme, constants: Sequence[Tensor]) -> None:
        for name in vars(self).get("_names", ()):
            delattr(self, name)
        self.scheme, self.constants = scheme, tuple(constants)
        self._names = list(scheme.specs(1, 1))
        for name, tensor in zip(self._names, constants, strict=True):
            setattr(self, name, tensor)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """What it takes in memory."""
        return sum(constant.nbytes for constant in self.constants)

    def data_ptr(self) -> int:
        """A number that tells weights apart, by which accelerate finds tied ones. It is negative, and no address.

        At that of the constants are no values of its dtype: who reads there takes FP8 for BF16, and reads past the end.
        """
        return -self.constants[0].data_ptr()

    def __dlpack__(self, **_: Any) -> Any:
        raise QuantizedWeightError(f"{self!r} has no memory that holds values of its dtype; use weight.dequantize()")

    def share_memory_(self) -> QuantizedWeight:
        """Move the constants to shared memory, for other processes."""
        for constant in self.constants:
            constant.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        return all(constant.is_shared() for constant in self.constants)  # type: ignore[no-untyped-call]

    def element_size(self) -> int:
        """Bytes that a value takes, scales aside: what diffusers' and transformers' ``get_memory_footprint`` counts."""
        return self.constants[0].element_size()

    def storage(self) -> Any:
        """Asked for by safetensors, which cannot hold what has no storage of its own.

        Raises:
            QuantizedWeightError: always.
        """
        raise QuantizedWeightError(
            f"{self!r} cannot be written by safetensors' save_file, which group offloading to the disk calls, too. "
            "Write the model by fp8_compile.save_fp8_checkpoint(model, file); or, of diffusers, call "
            "fp8_compile.quantize_(model) on the model itself, where only a part of it was converted, and "
            "save_pretrained again. Offload to memory instead of the disk"
        )

    def dequantize(self) -> Tensor:
        """The values that it stands for, in its dtype: ``[N, K]``, or ``[E, K, N]``."""
        if self.dim() == 2:
            return self.scheme.dequantize(self.constants, self.dtype)
        rows = tuple(constant.flatten(0, 1) for constant in self.constants)
        experts, k, n = self.shape
        return self.scheme.dequantize(rows, self.dtype).view(experts, n, k).mT

    def assign_(self, values: Tensor) -> QuantizedWeight:
        """Take over ``values``, of its shape: quantized, or as they are if their constants are made as these are.

        Raises:
            QuantizedWeightError: the shapes differ, or ``values`` is FP8 without a scale.
        """
        if values.shape != self.shape:
            raise QuantizedWeightError(f"values of shape {list(values.shape)} do not fit {self!r}")
        # Of the same constants, and perhaps another input scale, which belongs to them.
        alike = isinstance(values, QuantizedWeight) and values.scheme.called_with(self.scheme.options) == self.scheme
        new = values.constants if alike else _quantize(self.scheme, values)  # type: ignore[attr-defined]
        for old, made in zip(self.constants, new, strict=True):
            old.copy_(made)
        if alike and values.scheme.constants_key() != self.scheme.constants_key():  # type: ignore[attr-defined]
            self.scheme = values.scheme.called_with(self.scheme.options)  # type: ignore[attr-defined]
        return self

    # ``.data`` of a wrapper subclass would exchange the shape and the device, and leave the constants as they are.
    @property
    def data(self) -> QuantizedWeight:
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        new = value if isinstance(value, QuantizedWeight) else QuantizedWeight.quantize(value, self.scheme)
        if new.shape != self.shape:
            raise QuantizedWeightError(f".data of shape {list(value.shape)} does not fit {self!r}")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self._hold(new.scheme, new.constants)

    def __setitem__(self, index: Any, value: Any) -> None:
        values = self.dequantize()
        values[index] = value
        self.assign_(values)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({list(self.shape)}, {self.scheme!r}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        if id(self) not in memo:
            made = _like(self, (copy.deepcopy(constant, memo) for constant in self.constants))
            memo[id(self)] = _flagged(made, self.requires_grad, hasattr(self, "_is_param"))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # float8 as bytes: pickle alone, without torch.save, cannot read it back.
        inner = [c.view(torch.uint8) if c.dtype.is_floating_point and c.itemsize == 1 else c for c in self.constants]
        flags = self.requires_grad, hasattr(self, "_is_param")
        return rebuild_quantized_weight, (self.scheme.method, self.scheme.options, inner, self.dtype, *flags)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return self._names, (self.scheme, self.dtype)  # asked at every call, by Dynamo's guards

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], meta: tuple[Any, ...], size: Any, stride: Any
    ) -> QuantizedWeight:
        scheme, dtype = meta
        return QuantizedWeight(scheme, tuple(inner.values()), dtype)

    @classmethod
    @_disable_dynamo  # in a frame that Dynamo skipped, it would compile this one, and guard on each weight's id
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # where torch itself does not take composite operators apart
            made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if func in _MOVES:
            with torch.inference_mode(False), torch.no_grad():
                made = _MOVES[func](*args, **kwargs)
            if made is not None:
                return return_and_correct_aliasing(func, args, kwargs, made)  # type: ignore[no-untyped-call]
        if torch.is_inference_mode_enabled() and any(r.alias_info is not None for r in func._schema.returns):
            # What stands for a view of a weight that is no inference tensor is none either.
            with torch.inference_mode(False), torch.no_grad():
                return _on_values(func, args, kwargs)
        return _on_values(func, args, kwargs)


def _quantize(scheme: Scheme, weight: Tensor, device: torch.device | None = None) -> tuple[Tensor, ...]:
    weight = weight.detach()
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize()
    stacked = weight.dim() == 3 and scheme.no_experts is None
    if not (weight.dim() == 2 or stacked) or weight.dtype not in (*WEIGHT_DTYPES, torch.float64):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise QuantizedWeightError(
            f"{dtype} values of shape {list(weight.shape)} are no weight: expected a matrix of bfloat16, float16 or "
            "float32 (FP8 values with their scale are a QuantizedWeight)"
        )
    with torch.inference_mode(False), torch.no_grad():
        return scheme.quantize_stack(weight, device=device) if stacked else scheme.quantize_in_chunks(weight, device)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a stack ``[E, K, N]``, those of its values, which are in memory as ``[E, N, K]``."""
    *experts, rows, columns = shape
    return (rows * columns, 1, rows) if experts else (columns, 1)


def _checked_shape(scheme: Scheme, constants: Sequence[Tensor], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the weight that ``constants`` stand for."""
    if dtype not in WEIGHT_DTYPES:
        valid = ", ".join(map(str, WEIGHT_DTYPES))
        raise QuantizedWeightError(f"dtype={dtype}: a quantized weight stands for one of {valid}")
    stacked = bool(constants) and scheme.no_experts is None and all(constant.dim() == 3 for constant in constants)
    experts = constants[0].shape[0] if stacked else None
    n, k = scheme.weight_shape([c.flatten(0, 1)[: c.shape[1]] for c in constants] if stacked else constants)
    shape = (n, k) if experts is None else (experts, k, n)
    given = [(tuple(c.shape), c.dtype) for c in constants]
    expected = {name: (spec.shape, spec.dtype) for name, spec in scheme.specs_of(n, k, experts).items()}
    if given != list(expected.values()):
        raise QuantizedWeightError(
            f"constants of method {scheme.method!r} are {_listed(expected.items())} for a weight of shape "
            f"{list(shape)}, not {_listed(enumerate(given))}"
        )
    return shape


def _listed(constants: Iterable[tuple[Any, tuple[tuple[int, ...], torch.dtype]]]) -> str:
    return ", ".join(f"{name}: {dtype} {list(shape)}" for name, (shape, dtype) in constants)


def _like(
    weight: QuantizedWeight,
    constants: Iterable[Tensor],
    dtype: torch.dtype | None = None,
    identity: Identity | None = None,
) -> QuantizedWeight:
    return QuantizedWeight(weight.scheme, tuple(constants), dtype or weight.dtype, identity=identity)


def _flagged(made: QuantizedWeight, requires_grad: bool, is_parameter: bool) -> QuantizedWeight:
    if is_parameter:
        made._is_param = True
    made.requires_grad_(requires_grad)
    return made


def rebuild_quantized_weight(
    method: str,
    options: Mapping[str, Any],
    constants: Sequence[Tensor],
    dtype: torch.dtype,
    requires_grad: bool = False,
    is_parameter: bool = False,
) -> QuantizedWeight:
    """What pickles name; part of the format of files that ``torch.save`` writes.

    Raises:
        UnknownMethodError: no method of that name is registered.
    """
    scheme = scheme_named(method, options)
    made = [c.view(spec.dtype) for c, spec in zip(constants, scheme.specs(1, 1).values(), strict=True)]
    return _flagged(QuantizedWeight(scheme, made, dtype), requires_grad, is_parameter)


# Files name them by their public place, which no move of a module changes.
for _public in (QuantizedWeight, rebuild_quantized_weight):
    _public.__module__ = "fp8_compile"
torch.serialization.add_safe_globals([QuantizedWeight, rebuild_quantized_weight])


# --- operators that move the constants ---

_aten = torch.ops.aten


_collect_after = 0.0


def _let_go(weight: QuantizedWeight) -> None:
    """Free what compilations left behind and still refers weakly to ``weight``.

    ``Module.to`` moves a wrapper subclass by `torch.utils.swap_tensors`, which refuses a tensor with weak references.
    Dynamo leaves some in garbage, above all when a compilation fails.
    """
    global _collect_after
    if not weakref.getweakrefs(weight) or torch._guards.CompileContext.current_compile_id() is not None:
        return
    start = time.monotonic()
    if start < _collect_after:
        return
    gc.collect()
    if weakref.getweakrefs(weight):  # somebody holds it: what comes next shall not pay for that again and again
        end = time.monotonic()
        _collect_after = end + 10 * (end - start)


def _alias(weight: QuantizedWeight) -> QuantizedWeight:
    _let_go(weight)  # `torch.nn.Parameter` asks for an alias before the swap, also of what is there already
    return _like(weight, weight.constants, identity=weight.identity)


def _clone(weight: QuantizedWeight, **_: Any) -> QuantizedWeight:
    return _like(weight, (constant.clone() for constant in weight.constants))


def _move(
    weight: QuantizedWeight,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    memory_format: torch.memory_format | None = None,
    **where: Any,
) -> QuantizedWeight | None:
    if dtype not in (None, *WEIGHT_DTYPES) or layout not in (None, torch.strided):
        return None
    _let_go(weight)
    moved = (_aten._to_copy.default(constant, **where) for constant in weight.constants)
    return _like(weight, moved, dtype, weight.identity)


def _empty_like(
    weight: QuantizedWeight, *, dtype: torch.dtype | None = None, device: Any = None, pin_memory: bool = False, **_: Any
) -> QuantizedWeight | None:
    if dtype not in (None, *WEIGHT_DTYPES):
        return None
    made = (torch.empty_like(constant, device=device, pin_memory=pin_memory) for constant in weight.constants)
    return _like(weight, made, dtype)


def _pin(weight: QuantizedWeight, device: Any = None) -> QuantizedWeight:
    return _like(weight, (constant.pin_memory() for constant in weight.constants), identity=weight.identity)


_MOVES: dict[Any, Callable[..., QuantizedWeight | None]] = {
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
    if func is _aten.copy_.default and isinstance(args[0], QuantizedWeight):
        return args[0].assign_(args[1])
    if func is _aten.is_pinned.default:
        return func(args[0].constants[0], *args[1:], **kwargs)
    if func is _aten.record_stream.default:
        for inner in args[0].constants:
            func(inner, *args[1:], **kwargs)
        return None
    if any(isinstance(t, QuantizedWeight) for t in written_by_collective(func, args, kwargs)):
        raise QuantizedWeightError(
            f"{func} returns before it has written, and what was written has to be quantized: receive into a plain "
            "tensor, wait, and copy that into the weight"
        )
    if is_being_sharded():
        raise QuantizedWeightError(
            "a quantized weight cannot be sharded: the shards would hold its values dequantized, with FP8's error and "
            "twice its memory; shard the model and leave it in BF16, or convert it and do not shard it"
        )

    plain: dict[int, tuple[QuantizedWeight, Tensor]] = {}

    def value(weight: QuantizedWeight) -> Tensor:
        if id(weight) not in plain:
            plain[id(weight)] = weight, weight.dequantize()
        return plain[id(weight)][1]

    out = func(*tree_map_only(QuantizedWeight, value, args), **tree_map_only(QuantizedWeight, value, kwargs))
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        for weight in given if isinstance(given, (list, tuple)) else [given]:  # torch._foreach_add_
            if not isinstance(weight, QuantizedWeight):
                continue
            written = plain[id(weight)][1]
            if written.shape != weight.shape or written.dtype != weight.dtype:
                raise QuantizedWeightError(f"{func} would change the shape or the dtype of {weight!r}")
            weight.assign_(written)
    returned = {id(written): weight for weight, written in plain.values()}
    return tree_map_only(Tensor, lambda t: returned.get(id(t), t), out)
