"""The clock of a pipeline's steps, and what it tells of compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8_compile.pipelines.step_clock import StepClock


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize("backend", ["fp8_diffusion", "aot_eager"])
def test_it_names_what_is_compiled(backend: str) -> None:
    told: list[tuple[int, str]] = []
    with StepClock("cpu", lambda number, function: told.append((number, function))) as clock:
        for block in (Block(), Other()):
            options = {"inner_backend": "aot_eager"} if backend == "fp8_diffusion" else None
            block.compile(backend=backend, options=options)
            block(torch.ones(2))
    assert told == [(1, "Block.forward"), (2, "Other.forward")]
    assert clock.compile_seconds > 0
    Block()(torch.ones(2))
    assert len(told) == 2
