from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fp8_compile
from fp8_compile.options import Fp8Options
from fp8_compile.passes.context import Context
from fp8_compile.passes.float32_attention import float32_attention
from fp8_compile.passes.graphs import copy_graph, module_of
from tests.support.graphs import CONTEXT, Call, capture, rand, show
from tests.support.sqnr import sqnr

ASKED = dataclasses.replace(CONTEXT, options=Fp8Options(cpu_attention="float32"))
Q = rand(1, 2, 16, 64)


def rewrite(function: Callable[..., Any], *inputs: Tensor, context: Context = ASKED) -> tuple[Any, Any, int]:
    captured = capture(Call(function), *inputs)
    graph = copy_graph(captured.gm)
    count = float32_attention(graph, context)
    graph.lint()
    return captured, graph, count


def test_one() -> None:
    captured, graph, count = rewrite(lambda m, q: scaled_dot_product_attention(q, q, q, is_causal=True) + 1, Q)
    assert count == 1
    assert_expected_inline(
        show(graph),
        """\
x: bfloat16[1, 2, 16, 64]
attention_in_float32 = attention_in_float32(x, x, x, None, 0.0, True, None, False, torch.bfloat16)
add = add(attention_in_float32, 1)
return (add,)""",
    )
    (got,), (half,) = module_of(graph, captured.gm)(*captured.inputs), captured.gm(*captured.inputs)
    exact = scaled_dot_product_attention(Q.double(), Q.double(), Q.double(), is_causal=True) + 1
    assert got.dtype == torch.bfloat16
    assert sqnr(exact, got) >= sqnr(exact, half) > 45
    assert float32_attention(graph, ASKED) == 0


WAYS: dict[str, Callable[..., Tensor]] = {
    "a mask": lambda m, q: scaled_dot_product_attention(q, q, q, q[..., :16] * 0 - 1, 0.0, scale=0.5),
    "a mask of bools": lambda m, q: scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=q[..., :16] > 0),
    "the aten operator": lambda m, q: torch.ops.aten.scaled_dot_product_attention.default(q, q, q),
    "grouped queries": lambda m, q: scaled_dot_product_attention(q, q[:, :1], q[:, :1], enable_gqa=True),
}


@pytest.mark.parametrize("name", WAYS)
def test_other_ways_to_write_it(name: str) -> None:
    captured, graph, count = rewrite(WAYS[name], Q)
    assert count == 1
    (got,), (half,) = module_of(graph, captured.gm)(*captured.inputs), captured.gm(*captured.inputs)
    assert sqnr(half.float(), got) > 40


UNCHANGED: dict[str, tuple[Callable[..., Any], Tensor, Context]] = {
    "not asked for": (lambda m, q: scaled_dot_product_attention(q, q, q), Q, CONTEXT),
    "float32": (lambda m, q: scaled_dot_product_attention(q, q, q), Q.float(), ASKED),
    "written by hand": (lambda m, q: (q @ q.mT).softmax(-1) @ q, Q, ASKED),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_unchanged(name: str) -> None:
    function, q, context = UNCHANGED[name]
    captured, graph, count = rewrite(function, q, context=context)
    assert count == 0
    assert str(graph) == str(captured.graph)


def test_under_autocast_it_stays_in_float32() -> None:
    """Autocast would cast the operands back. And the report says that it was done."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q = self.to_q(x)
            return scaled_dot_product_attention(q, q, q)

    m = Attention().bfloat16()
    options = {"cpu_attention": "float32", "min_features": 64, "inner_backend": "aot_eager"}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(m, backend="fp8_diffusion", options=options)
        out = compiled(Q)
    plain = torch.compile(m, backend="fp8_diffusion", options={**options, "cpu_attention": "as-written"})
    with torch.no_grad():
        assert out.dtype == torch.bfloat16
        assert sqnr(plain(Q).float(), out) > 40
    assert "float32_attention: 1 matches" in str(fp8_compile.report(m))
