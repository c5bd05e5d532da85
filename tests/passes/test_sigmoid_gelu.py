from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn.functional import gelu

from fp8_compile import numerics
from fp8_compile.passes.graphs import copy_graph, example, module_of
from fp8_compile.passes.sigmoid_gelu import sigmoid_gelu
from tests.support.graphs import CONTEXT, Call, calls, capture, rand, show


def test_tanh() -> None:
    captured = capture(Call(lambda m, x: gelu(x, approximate="tanh") + 1), rand(4, 8))
    graph = copy_graph(captured.gm)
    assert sigmoid_gelu(graph, CONTEXT) == 1
    assert_expected_inline(
        show(graph),
        """\
x: bfloat16[4, 8]
gelu_by_sigmoid = gelu_by_sigmoid(x)
add = add(gelu_by_sigmoid, 1)
return (add,)""",
    )
    (node,) = calls(graph, numerics.gelu_by_sigmoid)
    assert example(node).shape == (4, 8)
    assert "gelu(x" in node.meta["stack_trace"]
    got, expected = module_of(graph, captured.gm)(*captured.inputs), captured.gm(*captured.inputs)
    torch.testing.assert_close(got[0], expected[0])
    assert sigmoid_gelu(graph, CONTEXT) == 0


def test_an_exported_graph() -> None:
    captured = capture(Call(lambda m, x: torch.ops.aten.gelu.default(x, approximate="tanh")), rand(4, 8))
    assert sigmoid_gelu(copy_graph(captured.gm), CONTEXT) == 1


UNCHANGED: dict[str, Any] = {
    "exact": (lambda m, x: gelu(x), rand(4, 8)),
    "float32": (lambda m, x: gelu(x, approximate="tanh"), rand(4, 8, dtype=torch.float32)),
    "written into a given tensor": (
        lambda m, x: torch._C._nn.gelu(x, approximate="tanh", out=torch.empty_like(x)),
        rand(4, 8),
    ),
    "tanh": (lambda m, x: torch.tanh(x) * x, rand(4, 8)),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_unchanged(name: str) -> None:
    function, x = UNCHANGED[name]
    captured = capture(Call(function), x)
    graph = copy_graph(captured.gm)
    assert sigmoid_gelu(graph, CONTEXT) == 0
    assert str(graph) == str(captured.graph)


def every(dtype: torch.dtype) -> Tensor:
    """All numbers of a 16-bit dtype, NaN and infinities too."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_never_further_from_the_formula_than_tanh_is(dtype: torch.dtype) -> None:
    x = every(dtype)
    got, theirs = numerics.gelu_by_sigmoid(x), gelu(x.float(), approximate="tanh").to(dtype)
    assert got.dtype == dtype
    assert got[x == torch.inf].item() == torch.inf
    assert torch.equal(got.isnan(), theirs.isnan())  # -inf * 0 in both
    finite = x.isfinite()
    x, got, theirs = x[finite].double(), got[finite].double(), theirs[finite].double()
    # 1 + tanh(u) cancels in float64 as well, far enough from 0; e ** (2 * u) does not.
    twice = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    exact = x / (1 + torch.exp(-twice))
    rounded = exact.to(dtype).double()
    assert (got != rounded).sum() <= (theirs != rounded).sum()
    # Half a unit in the last place is what the cast costs. Below, float32 itself ends, and float16's normal numbers.
    smallest = max(torch.finfo(dtype).smallest_normal, 1e-30)
    assert ((got - exact).abs() / exact.abs().clamp(min=smallest)).max() < 0.502 * torch.finfo(dtype).eps


@pytest.mark.inductor
def test_through_the_backend() -> None:
    torch._dynamo.reset()
    module = Call(lambda m, x: gelu(x @ m.w.t(), approximate="tanh"), w=(64, 32))
    compiled = torch.compile(module, backend="fp8_diffusion", options={"min_features": 512}, fullgraph=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="none of the 1 linears"):
        torch.testing.assert_close(compiled(x := rand(16, 32)), module(x), atol=1e-2, rtol=2e-2)
