"""Schemes: how one kind of FP8 quantization turns weights into constants and linears into scaled matmuls.

Passes, the weight binder and the report know a kind of quantization only through `Scheme`. A new method is one factory,
registered under the name that the option ``method`` takes::

    register_method("fp8-mine", lambda options: Scheme("fp8-mine", quantize_weight, quantize, linear))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import numerics
from ..errors import OptionError

if TYPE_CHECKING:
    from ..options import Fp8Options


def _refuses_nothing(in_features: int, out_features: int, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True)
class Scheme:
    """One kind of quantization.

    The three functions are called from graphs that AOTAutograd traces, so they must be made of torch operators and,
    to be found by a compile cache in another process, importable by module and name. Schemes are told apart by their
    functions: a factory that makes new functions at each call makes new constants for each graph.

    Attributes:
        name: what the report shows.
        quantize_weight: a weight ``[N, K]`` to its constants.
        quantize: an activation ``[..., K]`` to what ``linear`` takes as its first argument; None if it takes the
            activation as it is.
        linear: ``(quantized activation, *constants, bias | None, dtype)`` to ``[..., N]`` in ``dtype``.
        constants: the names of the constants, in the order in which ``quantize_weight`` returns them.
        refuses: ``(in_features, out_features, dtype)`` to the reason for which a layer cannot use this scheme, or None.
        fallback: the scheme for linears that the device refuses to run in this one; None if they are kept.
        few_rows: the scheme for linears whose input has fewer rows than ``min_rows``; None if they are kept.
    """

    name: str
    quantize_weight: Callable[[Tensor], tuple[Tensor, ...]]
    quantize: Callable[[Tensor], Any] | None
    linear: Callable[..., Tensor]
    constants: tuple[str, ...] = ("weight", "weight_scale")
    refuses: Callable[[int, int, torch.dtype], str | None] = _refuses_nothing
    # Neither makes a difference to constants.
    fallback: Scheme | None = field(default=None, compare=False)
    few_rows: Scheme | None = field(default=None, compare=False)

    def make_constants(self, weight: Tensor, transposed: bool) -> tuple[Tensor, ...]:
        """The constants of ``weight``, ``[N, K]``, or ``[K, N]`` if ``transposed``; fake ones if it is fake."""
        with torch.no_grad():
            return self.quantize_weight(weight.t().contiguous() if transposed else weight.contiguous())


def _multiple_of_16(in_features: int, out_features: int, dtype: torch.dtype) -> str | None:
    # cuBLASLt and CUTLASS both ask for 16-byte aligned FP8 rows; kept on every device so that decisions do not differ.
    for name, features in (("in_features", in_features), ("out_features", out_features)):
        if features % 16:
            return f"{name} {features} is not a multiple of 16"
    return None


ROW_AFTERWARDS = Scheme(
    name="fp8-row-afterwards",
    quantize_weight=numerics.quantize_rowwise,
    quantize=numerics.quantize_rowwise,
    linear=numerics.linear_then_scale,
    refuses=_multiple_of_16,
)
ROW = Scheme(
    name="fp8-row",
    quantize_weight=numerics.quantize_rowwise,
    quantize=numerics.quantize_rowwise,
    linear=numerics.scaled_linear,
    refuses=_multiple_of_16,
    fallback=ROW_AFTERWARDS,
)
TENSOR = Scheme(
    name="fp8-tensor",
    quantize_weight=numerics.quantize_tensorwise,
    quantize=numerics.quantize_tensorwise,
    linear=numerics.scaled_linear,
    refuses=_multiple_of_16,
)


def weight_only(scheme: Scheme) -> Scheme:
    """The scheme for few rows that shares its constants with ``scheme``.

    It refuses what ``scheme`` does, although no matmul asks for it here: at load time, when the number of rows is not
    known yet, the same weights must become FP8 as in compilation.
    """
    return Scheme(
        name="fp8-weight-only",
        quantize_weight=scheme.quantize_weight,
        quantize=None,
        linear=numerics.weight_only_linear,
        constants=scheme.constants,
        refuses=scheme.refuses,
    )


def scheme_of(granularity: str) -> Scheme:
    """The scheme whose constants an `Fp8Weight` of this granularity holds."""
    return {"row": ROW, "tensor": TENSOR}[granularity]


def _fp8(options: Fp8Options) -> Scheme:
    scheme = scheme_of(options.granularity)
    return replace(scheme, few_rows=weight_only(scheme)) if options.few_rows == "weight-only" else scheme


SchemeFactory = Callable[["Fp8Options"], Scheme]
_METHODS: dict[str, SchemeFactory] = {"fp8": _fp8}


def methods() -> list[str]:
    """The names that the option ``method`` takes."""
    return sorted(_METHODS)


def register_method(name: str, factory: SchemeFactory) -> None:
    """Make ``method=name`` available.

    Args:
        name: value of the option; must not be taken.
        factory: from the options to the scheme; may raise `OptionError` for options that the method cannot serve.

    Raises:
        OptionError: ``name`` is taken.
    """
    if name in _METHODS:
        raise OptionError(f"method {name!r} is registered already; registered: {', '.join(methods())}")
    _METHODS[name] = factory


def scheme_for(options: Fp8Options) -> Scheme:
    """The scheme that ``options.method`` stands for."""
    return _METHODS[options.method](options)
