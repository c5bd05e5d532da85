"""Linears of few rows: what ``min_m`` and ``small_m`` mean to a method that multiplies quantized activations."""

from __future__ import annotations

from ..errors import OptionError
from ..options import check_choice, check_count
from .scheme import Call, high_precision

SMALL_M = ("weight-only", "keep")


def check_few_rows(min_m: int, small_m: str) -> None:
    """Refuse values that are not valid.

    Raises:
        OptionError: names the value and the valid ones.
    """
    check_choice("small_m", small_m, SMALL_M)
    check_count("min_m", min_m)


def check_few_rows_at_load(small_m: str) -> None:
    """Refuse ``"keep"``, which needs to know how many rows a layer sees.

    Raises:
        OptionError: names the option and what to do.
    """
    if small_m != "weight-only":
        raise OptionError(
            f"small_m={small_m!r}: at load time it is not known how many rows a layer will see; use "
            "'weight-only', and name the layers that shall stay as they are in ignored_layers"
        )


def few_rows(m: float, min_m: int, small_m: str, weight_only: Call) -> tuple[Call, ...]:
    """How a linear of ``m`` rows per sample runs if they are fewer than ``min_m``; nothing if they are not."""
    if m >= min_m:
        return ()
    return (weight_only if small_m == "weight-only" else high_precision(f"M is below min_m {min_m}"),)
