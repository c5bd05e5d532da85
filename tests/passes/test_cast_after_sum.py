from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from fp8_compile.passes.cast_after_sum import cast_after_sum
from fp8_compile.passes.graphs import copy_graph, module_of
from tests.support.graphs import CONTEXT, Call, capture, rand, show
from tests.support.sqnr import sqnr


def experts(m: nn.Module, x: Tensor) -> Tensor:
    return F.grouped_mm(x, m.w, offs=torch.full((3,), 8, dtype=torch.long).cumsum(0, dtype=torch.int32))


def test_offsets() -> None:
    captured = capture(Call(experts, w=(3, 64, 32)), rand(24, 64))
    graph = copy_graph(captured.gm)
    assert cast_after_sum(graph, CONTEXT) == 1
    assert_expected_inline(
        show(graph),
        """\
self.w: bfloat16[3, 64, 32]
x: bfloat16[24, 64]
full = full((3,), 8, dtype=torch.int64)
cumsum_1 = .cumsum(full, 0)
to = .to(cumsum_1, torch.int32)
_grouped_mm = _grouped_mm(x, self.w, offs=to, bias=None, out_dtype=None)
return (_grouped_mm,)""",
    )
    got, expected = module_of(graph, captured.gm)(*captured.inputs), captured.gm(*captured.inputs)
    assert torch.equal(got[0], expected[0])
    assert cast_after_sum(graph, CONTEXT) == 0


def of_floats(m: nn.Module, x: Tensor) -> Tensor:
    return F.grouped_mm(x, m.w, offs=torch.full((3,), 8.5).cumsum(0, dtype=torch.int32))


def other(m: nn.Module, x: Tensor) -> Tensor:
    return F.grouped_mm(x, m.w, offs=torch.full((3,), 8).cumsum(0).to(torch.int32)).cumsum(0, dtype=torch.float32)


@pytest.mark.parametrize("function", [of_floats, other])
def test_other_sums_stay(function: Any) -> None:
    captured = capture(Call(function, w=(3, 64, 32)), rand(24, 64))
    assert cast_after_sum(copy_graph(captured.gm), CONTEXT) == 0


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("options", [{}, {"ignored_layers": ["w"]}], ids=["fp8", "bfloat16"])
def test_inductor_takes_them(options: dict[str, Any]) -> None:
    m = Call(experts, w=(3, 64, 32))
    expected = experts(m, x := rand(24, 64))
    m.compile(backend="fp8_diffusion", fullgraph=True, options={"min_features": 1, **options})
    with torch.no_grad():
        assert sqnr(expected, m(x)) > 26
