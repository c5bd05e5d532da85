"""What a scheme is: one kind of quantization, which weights carry and graphs are written by.

A scheme is identified by its method's name and its options: a frozen dataclass of plain values. So it can be copied,
compared, pickled and written into files, and holds no function. Nothing outside of this folder asks how it is made.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError, QuantizedWeightError


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a constant, which is contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype


ONES = "ones"
"""Among what a `Call` takes: ones, ``[MOST_ROWS, 1]`` float32, the same memory for all graphs on a device."""

MOST_ROWS = 1 << 20


@dataclass(frozen=True)
class Call:
    """How one linear of a graph runs.

    The functions become nodes of a graph that AOTAutograd traces: they must be made of torch operators and, to be found
    by a compile cache in another process, importable by module and name.

    Attributes:
        name: what the report shows.
        linear: ``(activation, *operands, bias | None, dtype)`` to ``[..., N]`` in ``dtype``; None if the linear runs
            as it is written, on the weight that the constants stand for. Of experts, the offsets stand for the bias.
        quantize: an activation ``[..., K]``, and what ``takes`` names, to what ``linear`` takes; None if that is the
            activation itself.
        reason: why ``linear`` is None; or, where nothing is quantized for it, why that is all that the device can do.
        reference: what ``linear`` must agree with, of the same arguments; a GPU whose kernel does not, for a shape, is
            taken for one that refuses it. For kernels that are wrong without a word where they are. None: it is only
            asked whether ``linear`` runs.
        operands: names of the constants that ``linear`` takes; None: all.
        takes: names of constants, or `ONES`. Linears that read one activation share what ``quantize`` made of it, so
            their constants of these names must be the same.
    """

    name: str
    linear: Callable[..., Tensor] | None
    quantize: Callable[..., Any] | None = None
    reason: str = ""
    reference: Callable[..., Tensor] | None = None
    takes: tuple[str, ...] = ()
    operands: tuple[str, ...] | None = None
    mixes_samples: bool = False

    def operands_of(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Those of ``named``, constants by their names in order, that ``linear`` takes."""
        return tuple(named.values() if self.operands is None else (named[name] for name in self.operands))


def high_precision(reason: str) -> Call:
    """The linear as it is written; a weight that is quantized already is dequantized for it."""
    return Call("high precision", None, reason=reason)


@dataclass(frozen=True)
class Scheme(abc.ABC):
    """One kind of quantization; a method is a subclass, whose fields are the method's own options.

    Equal schemes make equal constants of a weight, but for what fields without ``compare`` say of a single layer; they
    have the same graphs. Options are checked when a scheme is made (``__post_init__``), which raises `OptionError`.

    Attributes:
        method: the value of the option ``method``.
        call_options: the names of those fields that make no difference to constants: over weights that are quantized
            already, they may be given anew when a graph is compiled.
        min_capability: the compute capability that an NVIDIA GPU needs for it; the default is that of Ampere, the first
            for which Inductor writes bfloat16 code.
    """

    method: ClassVar[str]
    call_options: ClassVar[tuple[str, ...]] = ()
    min_capability: ClassVar[tuple[int, int]] = (8, 0)

    @abc.abstractmethod
    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        """The constants of a weight ``[out_features, in_features]`` by name, in the order of ``quantize_weight``.

        Names are those of attributes: "qdata" and "scale" where nothing else is meant.
        """

    def weight_shape(self, constants: Sequence[Tensor]) -> tuple[int, int]:
        """The shape ``[N, K]`` of the weight that ``constants`` stand for; the default: that of the first."""
        if not constants or constants[0].dim() != 2:
            shapes = [list(constant.shape) for constant in constants]
            raise QuantizedWeightError(f"method {self.method!r}: constants of shapes {shapes} stand for no matrix")
        return constants[0].shape[0], constants[0].shape[1]

    @abc.abstractmethod
    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The constants of ``weight``, ``[N, K]``.

        NaN or Inf in a weight must show in a constant that `finite` looks at, as it does in a scale made from the amax.
        The weight may be fake, so its values must not be looked at.
        """

    @abc.abstractmethod
    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The weight ``[N, K]`` that ``constants`` stand for, in ``dtype``."""

    @abc.abstractmethod
    def for_call(self, m: float, device: torch.device) -> tuple[Call, ...]:
        """How a linear runs in a graph: the ways in order of preference.

        A way that the device refuses for this shape falls back to the next; after the last one the linear stays as it
        is written.

        Args:
            m: rows of the activation that belong to one sample, so that all batch sizes run alike; infinite if the
                number of rows is known only at run time.
        """

    @property
    def no_experts(self) -> str | None:
        """Why the matrices of experts that one parameter holds cannot have this scheme, or None.

        Who returns None has constants with a row for each of the weight's: those of a stack are those of each matrix.
        """
        return f"experts: not with method {self.method!r}"

    def for_experts(self, m: float, device: torch.device) -> tuple[Call, ...]:
        """`for_call` where `no_experts` is None: how a `grouped_mm` of ``m`` tokens of all experts runs.

        The calls take constants of stacks (`specs_of`), and, in the place of a bias, where each expert's tokens end.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not say no_experts")

    def specs_of(self, out_features: int, in_features: int, experts: int | None = None) -> dict[str, Spec]:
        """`specs`; of a stack of so many such matrices, if there is a number: each constant is a stack, too."""
        made = self.specs(out_features, in_features)
        if experts is None:
            return made
        return {name: Spec((experts, *spec.shape), spec.dtype) for name, spec in made.items()}

    def quantize_stack(
        self, weights: Tensor, transposed: bool = True, device: torch.device | None = None
    ) -> tuple[Tensor, ...]:
        """The constants of the matrices of experts, one at a time, on ``device`` or where they are.

        Args:
            weights: ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``, as diffusers has them.
        """
        from torch._subclasses.fake_tensor import FakeTensor

        weights = weights.mT if transposed else weights
        experts, n, k = weights.shape
        specs = self.specs_of(n, k, experts)
        made = tuple(weights.new_empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs.values())
        if weights.is_meta or isinstance(weights, FakeTensor):  # nothing to compute of hundreds of experts
            return made
        for i, weight in enumerate(weights):
            for stack, one in zip(made, self.quantize_in_chunks(weight, device), strict=True):
                stack[i].copy_(one)
        return made

    @classmethod  # noqa: B027
    def check_given(cls, options: Mapping[str, Any]) -> None:
        """Refuse options that a user gave and that exclude each other, whatever their values.

        A scheme does not know whether a value was given or is the default.

        Raises:
            OptionError: names both.
        """

    def check_at_load(self) -> None:  # noqa: B027
        """Refuse options that cannot be served before a graph is seen.

        Raises:
            OptionError: names the option and what to do.
        """

    def reason(self, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
        """Why the scheme cannot take a weight ``[out_features, in_features]`` of ``dtype``, or None."""
        return None

    def quantize_in_chunks(self, weight: Tensor, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """`quantize_weight`, on ``device``, where a few rows are at a time; None leaves them where they are.

        The default is in chunks where the first dimension of each constant is N, or N over `rows_together`, so that
        rows do not depend on others, and else at once.
        """
        specs, together = self.specs(*weight.shape), self.rows_together
        device = weight.device if device is None else device
        along = {weight.shape[0], -(-weight.shape[0] // together)}
        if weight.numel() == 0 or any(not along & {*spec.shape[:1]} for spec in specs.values()):
            return self.quantize_weight(weight.to(device))
        made = tuple(torch.empty(spec.shape, dtype=spec.dtype, device=device) for spec in specs.values())
        rest = made
        for chunk in torch.split(weight, max(1, chunk_rows(weight, device) // together) * together):
            parts = self.quantize_weight(chunk.to(device))
            for whole, part in zip(rest, parts, strict=True):
                whole[: part.shape[0]].copy_(part)
            rest = tuple(whole[part.shape[0] :] for whole, part in zip(rest, parts, strict=True))
        return made

    @property
    def rows_together(self) -> int:
        """How many rows of a weight share one of a constant, as in a block with one scale; by default 1."""
        return 1

    @property
    def label(self) -> str:
        """What a report calls weights of this scheme that have run in no graph yet."""
        return self.method

    @property
    def on_cpu(self) -> str:
        """What a report says of how a CPU multiplies such weights, where it depends on the CPU; by default nothing."""
        return ""

    @property
    def static(self) -> bool:
        """Whether a scale of activations is one of the constants."""
        return False

    @property
    def input_scale_missing(self) -> bool:
        """Whether no constants can be made before `with_input_scale` says what stands for a unit of the activation."""
        return False

    def with_input_scale(self, scale: float | None) -> Scheme:
        """This scheme for a layer whose activations have a scale that was calibrated; or, None, was not."""
        raise NotImplementedError(f"{type(self).__qualname__} says input_scale_missing")

    def constants_key(self) -> Hashable:
        """What tells the constants of this scheme from those of others: schemes that agree in it share them."""
        return self.called_with({f.name: f.default for f in dataclasses.fields(self)})

    def called_with(self, options: Mapping[str, Any]) -> Scheme:
        """This scheme with those of ``options`` that are `call_options`."""
        given = {name: options[name] for name in self.call_options if name in options}
        return dataclasses.replace(self, **given) if given else self

    def __deepcopy__(self, memo: dict[int, Any]) -> Scheme:
        return self  # it cannot change, and Dynamo's guards compare their copy at every call: identity is quick

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def common_options(self) -> dict[str, Any]:
        """Those that equal schemes have in common."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}

    # --- in files ---

    def suffixes(self) -> tuple[str | None, ...]:
        """What stands behind the weight's name in files, for each constant.

        The default is compressed-tensors' layout: ``PATH.weight`` and ``PATH.weight_scale``. One that begins with a dot
        stands in the place of "weight": ``.input_scale`` for ``PATH.input_scale``. None: it is in no file, and `read`
        makes it of the others.
        """
        return ("", *(f"_{name}" for name in list(self.specs(1, 1))[1:]))

    def by_suffix(self, constants: Sequence[Tensor]) -> dict[str, Tensor]:
        """Those of ``constants`` that files have, by their suffixes."""
        named = zip(self.suffixes(), constants, strict=True)
        return {suffix: constant for suffix, constant in named if suffix is not None}

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Scheme, tuple[Tensor, ...]]:
        """The scheme and the constants that ``tensors``, by the suffixes of their names in a file, stand for.

        Raises:
            QuantizedWeightError: a shape, a dtype or a value is none that the scheme writes.
        """
        return self, tuple(tensors[suffix] for suffix in self.suffixes() if suffix is not None)


def finite(constants: Sequence[Tensor]) -> Tensor:
    """Whether the weight that ``constants`` were made of is finite: a bool without dimensions, on their device.

    Scales tell, since NaN and Inf reach them through the amax, and they are small.
    """
    found = [t.isfinite().all() for t in constants if t.is_floating_point() and t.itemsize > 1]
    return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool)


def check_class(scheme: Any, name: str | None = None) -> type[Scheme]:
    """Refuse what is no method.

    Args:
        name: that the method is registered under elsewhere.

    Raises:
        OptionError: says what is missing.
    """
    if not (isinstance(scheme, type) and issubclass(scheme, Scheme)):
        raise OptionError(f"{scheme!r} is no method: expected a subclass of fp8_compile.Scheme")
    own = vars(scheme).get("method")
    if not isinstance(own, str):
        raise OptionError(f"{scheme.__qualname__} has no class attribute `method` of its own, the method's name")
    if name is not None and own != name:
        raise OptionError(f"{scheme.__qualname__} is registered as {name!r}, and its own name is {own!r}")
    fields = dataclasses.fields(scheme)
    if "__dataclass_fields__" not in vars(scheme) or any(f.default is dataclasses.MISSING for f in fields):
        raise OptionError(f"{scheme.__qualname__}: expected a frozen dataclass whose fields have defaults")
    made = scheme()
    for constant in made.specs(256, 256):
        if hasattr(Tensor, constant) or constant in ("constants", "identity", "scheme"):
            raise OptionError(
                f"{scheme.__qualname__}: a constant called {constant!r} would hide an attribute of tensors"
            )
    if made.suffixes()[:1] != ("",):
        raise OptionError(f"{scheme.__qualname__}: the first of suffixes() must be '', the weight's own name")
    return scheme


# Elements quantized at a time: what bounds the memory that quantizing a large weight takes, 10 bytes for each. On a CPU
# so few that most of it stays in its caches.
CHUNK = 1 << 20
CHUNK_ON_CPU = 1 << 19


def chunk_rows(weight: Tensor, device: torch.device) -> int:
    """How many rows of ``weight``, ``[N, K]``, are quantized on ``device`` at a time."""
    chunk = CHUNK_ON_CPU if device.type == "cpu" else CHUNK
    return max(1, weight.shape[0] if weight.is_meta else chunk // max(1, weight.shape[1]))
