"""Whether a linear may become FP8: one ordered list of checks, for graphs and for load time alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import Fp8Options
from ..patterns import first_match, is_adapter, layer_path
from ..schemes import Scheme
from .quantized_weight import QuantizedWeight

QUANTIZABLE_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Candidate:
    """A linear that is decided on.

    Attributes:
        weight: ``[N, K]``, or ``[K, N]`` if ``transposed``; fake in a graph.
        path: of its module, as in ``named_modules``.
        features: input and output features.
        transposed: the weight is stored input features first.
        written: why the way in which a graph has the linear cannot be replaced, or None.
        earlier: why an earlier conversion of the model left the weight as it is, or None.
    """

    weight: Tensor
    path: str
    features: tuple[int, int]
    transposed: bool = False
    written: str | None = None
    earlier: str | None = None


def reason(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    """Why ``candidate`` stays in high precision, or None if it may become FP8.

    Args:
        scheme: that its weight has, or would get.
    """
    return next((found for check in CHECKS if (found := check(candidate, options, scheme)) is not None), None)


def pattern_of(path: str, options: Fp8Options) -> str | None:
    """The entry of ``ignored_layers`` that names the layer at ``path``; none names an adapter's."""
    return None if is_adapter(path) else first_match(options.ignored_layers, layer_path(path))


def _adapter(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    return "low-rank adapter" if is_adapter(candidate.path) else None


def _ignored(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    pattern = pattern_of(candidate.path, options)
    return None if pattern is None else f"ignored_layers: {pattern}"


def _written(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    return candidate.written


def _earlier(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    return candidate.earlier


def _transposed(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    """The scales of a quantized weight belong to what are input features here."""
    exchanged = candidate.transposed and isinstance(candidate.weight, QuantizedWeight)
    return "used with its features exchanged" if exchanged else None


def _subclass(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    """Seen through the fake tensor that stands for a plain one."""
    from torch._subclasses.fake_tensor import FakeTensor

    kind = type(candidate.weight)
    known = (Tensor, torch.nn.Parameter, FakeTensor, QuantizedWeight)
    return None if kind in known else f"weight is a {kind.__name__}"


def _dtype(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    dtype = candidate.weight.dtype
    if dtype in QUANTIZABLE_DTYPES:
        return None
    return f"weight is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"


def _narrow(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    narrow = min(candidate.features) < options.min_features and not isinstance(candidate.weight, QuantizedWeight)
    return f"narrower than min_features {options.min_features}" if narrow else None


def _scheme(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    if isinstance(candidate.weight, QuantizedWeight):
        return None  # how it runs is another question
    in_features, out_features = candidate.features
    return scheme.reason(out_features, in_features, candidate.weight.dtype)


CHECKS: tuple[Callable[[Candidate, Fp8Options, Scheme], str | None], ...] = (
    _adapter,  # first: a pattern names the layer that it adapts
    _ignored,  # before all that only explains: it is what the user asked for
    _written,  # before those that need a matrix
    _earlier,
    _transposed,
    _subclass,
    _dtype,
    _narrow,
    _scheme,
)
"""The first that finds a reason decides."""
