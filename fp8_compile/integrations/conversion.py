"""FP8 weights on their way through diffusers' conversion of single files, from an author's names to its own.

A conversion renames tensors, takes fused projections apart and puts others together, by rows. A `QuantizedWeight` would
give its values there, dequantized, which are then rounded to FP8 a second time. A `Rows` goes through as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantizedWeightError
from ..schemes import Scheme
from ..schemes.fp8 import INPUT_SCALE
from ..weights.quantized_weight import QuantizedWeight

_aten = torch.ops.aten


class Rows(Tensor):
    """The constants of a weight, each with a row for each of the weight's, or one for all of them.

    Attributes:
        parts: by the suffixes that they have in files.
    """

    scheme: Scheme
    parts: dict[str, Tensor]

    # Every operator goes to __torch_dispatch__, and results are not wrapped again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, scheme: Scheme, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Rows:
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=parts[""].device)
        made.scheme, made.parts = scheme, dict(parts)
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Rows:
        """What ``weight`` is while names change."""
        return cls(weight.scheme, weight.scheme.by_suffix(weight.constants), weight.shape, weight.dtype)

    def weight(self) -> QuantizedWeight:
        """What it is afterwards.

        Raises:
            QuantizedWeightError: the scheme cannot read what has become of the constants.
        """
        return QuantizedWeight(*self.scheme.read(self.parts), self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Rows({list(self.shape)}, {self.scheme!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = args[0]
        rows = (0, -(given[0] if isinstance(given, (list, tuple)) else given).dim())  # of a stack, experts
        try:
            if func in _SAME:
                return cls(given.scheme, given.parts, given.shape, given.dtype)
            if func in _TAKING and _dim(args, kwargs or {}, _TAKING[func]) in rows:
                return _taken(given, lambda tensor: func(tensor, *args[1:], **(kwargs or {})))
            if func is _aten.cat.default and _dim(args, kwargs or {}, 1) in rows:
                return _together(given)
        except _NotByRowsError:
            pass
        raise QuantizedWeightError(
            f"diffusers' conversion of this file does {func} with FP8 weights, whose scales cannot follow; convert the "
            "names by load_fp8_checkpoint(model, file, rename=...), or the file before it is quantized"
        )


class _NotByRowsError(Exception):
    pass


_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default)

# Which take rows out, and where the dimension stands among their arguments.
_TAKING = {_aten.split.Tensor: 2, _aten.split_with_sizes.default: 2, _aten.slice.Tensor: 1}


def _dim(args: Sequence[Any], kwargs: Mapping[str, Any], position: int) -> int:
    given: int = args[position] if position < len(args) else kwargs.get("dim", 0)
    return given


def _taken(rows: Rows, take: Callable[[Tensor], Any]) -> Any:
    """What ``take`` takes out of each part; one that is for all rows goes with each."""
    made = {suffix: take(part) for suffix, part in rows.parts.items() if _by_rows(part, rows)}
    if isinstance(made[""], Tensor):
        parts = {suffix: made.get(suffix, part) for suffix, part in rows.parts.items()}
        return Rows(rows.scheme, parts, (made[""].shape[0], *rows.shape[1:]), rows.dtype)
    return [
        Rows(
            rows.scheme,
            {suffix: made[suffix][i] if suffix in made else part for suffix, part in rows.parts.items()},
            (piece.shape[0], *rows.shape[1:]),
            rows.dtype,
        )
        for i, piece in enumerate(made[""])
    ]


def _together(pieces: Sequence[Rows]) -> Rows:
    """The rows of all ``pieces``, one after another."""
    first = pieces[0]
    if not all(isinstance(piece, Rows) and piece.scheme.method == first.scheme.method for piece in pieces):
        raise _NotByRowsError
    parts: dict[str, Tensor] = {}
    for suffix, part in first.parts.items():
        if suffix == INPUT_SCALE:  # they read one activation
            if all(suffix in piece.parts for piece in pieces):
                parts[suffix] = torch.stack([piece.parts[suffix].reshape(()) for piece in pieces]).amax()
            continue
        if all(not _by_rows(piece.parts[suffix], piece) and torch.equal(piece.parts[suffix], part) for piece in pieces):
            parts[suffix] = part
        else:
            parts[suffix] = torch.cat([_row_for_row(piece.parts[suffix], piece) for piece in pieces])
    return Rows(first.scheme, parts, (sum(len(piece) for piece in pieces), *first.shape[1:]), first.dtype)


def _row_for_row(part: Tensor, rows: Rows) -> Tensor:
    return part if _by_rows(part, rows) else part.reshape(1, 1).repeat(rows.shape[0], 1)


def _by_rows(part: Tensor, rows: Rows) -> bool:
    """Whether ``part`` has a row for each of the weight's, and not one number for all of them."""
    if part.dim() > 0 and part.shape[0] == rows.shape[0]:
        return True
    if part.numel() == 1:
        return False
    raise _NotByRowsError
