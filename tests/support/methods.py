"""A method that a test registers: weights stored doubled in float16, beside a mark of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fp8_compile import Call, Scheme, Spec
from fp8_compile.options import check_count

used: list[str] = []


def quantize(x: Tensor) -> Tensor:
    used.append("quantize")
    return x / 2


def linear(x: Tensor, doubled: Tensor, factor: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = doubled.to(x.dtype) * (2 / factor).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias).to(dtype)


HOW = Call("doubled", linear, quantize)


@dataclass(frozen=True)
class Doubled(Scheme):
    """Every weight times ``factor``, in float16."""

    method: ClassVar[str] = "doubled"

    factor: int = 2

    def __post_init__(self) -> None:
        check_count("factor", self.factor)

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return {
            "doubled": Spec((out_features, in_features), torch.float16),
            "factor_of_rows": Spec((out_features, 1), torch.float32),
        }

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        factor = torch.full((weight.shape[0], 1), float(self.factor), device=weight.device)
        # NaN and Inf show in a float32 constant.
        return (weight * self.factor).to(torch.float16), factor + 0 * weight.float().sum(1, keepdim=True)

    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        doubled, factor = constants
        return (doubled / factor).to(dtype)

    def for_call(self, m: float, device: torch.device) -> tuple[Call, ...]:
        return (HOW,)

    def reason(self, out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
        return "too odd" if out_features % 2 else None
