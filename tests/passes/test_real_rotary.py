from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import Graph

from fp8_compile.passes.graphs import copy_graph, example, module_of
from fp8_compile.passes.real_rotary import real_rotary
from tests.support.graphs import CONTEXT, Call, Captured, calls, capture, show

Function = Callable[..., Any]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def factors(*shape: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.polar(torch.ones(shape), values(*shape)).to(dtype)


def qwen_image(m: Any, x: Tensor, freqs: Tensor) -> Tensor:
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * freqs.unsqueeze(1)).flatten(3).type_as(x)


def rewritten(captured: Captured) -> tuple[int, Graph]:
    graph = copy_graph(captured.gm)
    return real_rotary(graph, CONTEXT), graph


def assert_same_results(captured: Captured, graph: Graph) -> None:
    """Equal but for the rounding of a sum of two products."""
    got, expected = module_of(graph, captured.gm)(*captured.inputs), captured.gm(*captured.inputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.is_contiguous() == theirs.is_contiguous()
        torch.testing.assert_close(ours, theirs)


def test_rotation_of_qwen_image() -> None:
    captured = capture(Call(qwen_image), values(2, 8, 4, 16, dtype=torch.bfloat16), factors(8, 8))
    count, graph = rewritten(captured)
    assert count == 1
    assert_expected_inline(
        show(graph),
        """\
x: bfloat16[2, 8, 4, 16]
more.0: complex64[8, 8]
float_1 = .float(x)
reshape = .reshape(float_1, 2, 8, 4, -1, 2)
resolve_conj = resolve_conj(more.0)
view_as_real_1 = view_as_real(resolve_conj)
unsqueeze_1 = unsqueeze(view_as_real_1, 1)
getitem = getitem(unsqueeze_1, (Ellipsis, slice(0, 1, None)))
getitem_1 = getitem(unsqueeze_1, (Ellipsis, slice(1, 2, None)))
arange = arange(2, device=cpu)
mul_1 = mul(arange, 2)
sub = sub(mul_1, 1)
mul_2 = mul(getitem_1, sub)
flip = flip(reshape, (-1,))
mul_3 = mul(flip, mul_2)
mul_4 = mul(reshape, getitem)
add = add(mul_4, mul_3)
flatten = .flatten(add, 3)
type_as = .type_as(flatten, x)
return (type_as,)""",
    )
    assert_same_results(captured, graph)


def test_one_table_for_queries_and_keys() -> None:
    both = Call(lambda m, q, k, freqs: (qwen_image(m, q, freqs), qwen_image(m, k, freqs)))
    captured = capture(both, values(2, 8, 4, 16), values(2, 8, 2, 16), factors(8, 8))
    count, graph = rewritten(captured)
    assert count == 2
    # Dynamo writes one `unsqueeze` for each; the tables are made of their common origin.
    assert len(calls(graph, torch.view_as_real)) == 2
    assert calls(graph, torch.view_as_complex) == []
    assert_same_results(captured, graph)


def test_metadata_is_that_of_the_product() -> None:
    captured = capture(Call(qwen_image), values(2, 8, 4, 16), factors(8, 8))
    _, graph = rewritten(captured)
    for node in (node for node in graph.nodes if node.op == "call_function"):
        assert "x.float()" in node.meta["stack_trace"] or "view_as_real" in node.meta["stack_trace"]
    (flatten,) = graph.find_nodes(op="call_method", target="flatten")
    assert example(flatten.args[0]).shape == (2, 8, 4, 8, 2)


REWRITTEN: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "other order": (
        lambda m, x, f: torch.view_as_real(f * torch.view_as_complex(x)),
        (values(8, 4, 2), factors(8, 4)),
    ),
    "torch.mul": (
        lambda m, x, f: torch.view_as_real(torch.mul(torch.view_as_complex(x), f)),
        (values(8, 4, 2), factors(8, 4)),
    ),
    "method": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x).mul(f)),
        (values(8, 4, 2), factors(8, 4)),
    ),
    "negative unsqueezes": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x) * f.unsqueeze(-2).unsqueeze(dim=0)),
        (values(3, 8, 5, 4, 2), factors(8, 4)),
    ),
    "conjugated": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x) * f.conj()),
        (values(8, 4, 2), factors(8, 4)),
    ),
    "double precision": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x) * f),
        (values(8, 4, 2, dtype=torch.float64), factors(8, 4, dtype=torch.complex128)),
    ),
    "mixed precision": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x) * f),
        (values(8, 4, 2), factors(8, 4, dtype=torch.complex128)),
    ),
    "factors have more dimensions": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x) * f),
        (values(4, 2), factors(3, 8, 4)),
    ),
    "both are activations": (
        lambda m, x, y: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y)),
        (values(8, 4, 2), values(1, 4, 2)),
    ),
    "factors are written between two rotations": (
        lambda m, x, f: (
            torch.view_as_real(torch.view_as_complex(x) * f),
            f.mul_(2),
            torch.view_as_real(torch.view_as_complex(x) * f),
        )[::2],
        (values(8, 4, 2), factors(8, 4)),
    ),
    "factors are written between a product and its real view": (
        lambda m, x, f: (
            z := torch.view_as_complex(x) * f,
            f.mul_(2),
            torch.view_as_real(z),
            torch.view_as_real(torch.view_as_complex(x) * f),
        )[2:],
        (values(8, 4, 2), factors(8, 4)),
    ),
    "real views in another order than the products": (
        lambda m, x, y, f: (
            a := torch.view_as_complex(x) * f,
            b := torch.view_as_complex(y) * f,
            torch.view_as_real(b),
            torch.view_as_real(a),
        )[2:],
        (values(8, 4, 2), values(8, 4, 2) + 1, factors(8, 4)),
    ),
    "the activation is written after the view": (
        lambda m, x, f: (z := torch.view_as_complex(x), x.add_(1), torch.view_as_real(z * f))[2],
        (values(8, 4, 2), factors(8, 4)),
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name: str) -> None:
    function, inputs = REWRITTEN[name]
    given = [x.clone() for x in inputs]  # which the capture may write into
    captured = capture(Call(function), *given)
    order = [
        next(i for i, x in enumerate(given) if x is y) for y in captured.inputs
    ]  # Dynamo takes them as it meets them
    count, graph = rewritten(captured)
    assert count == len(calls(captured.graph, torch.view_as_real))
    got, expected = (gm(*[inputs[i].clone() for i in order]) for gm in (module_of(graph, captured.gm), captured.gm))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


UNCHANGED: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "a number": (
        lambda m, x: torch.view_as_real(torch.view_as_complex(x) * 2),
        (values(8, 4, 2),),
    ),
    "a real tensor": (
        lambda m, x, mask: torch.view_as_real(torch.view_as_complex(x) * mask),
        (values(8, 4, 2), values(8, 4)),
    ),
    "no activation in real numbers": (
        lambda m, x, f: torch.view_as_real(x * f),
        (factors(8, 4), factors(8, 4)),
    ),
    "the product has another reader": (
        lambda m, x, f: (z := torch.view_as_complex(x) * f, torch.view_as_real(z), z.abs())[1:],
        (values(8, 4, 2), factors(8, 4)),
    ),
    "two views of one product": (
        lambda m, x, f: (z := torch.view_as_complex(x) * f, torch.view_as_real(z).add_(1), torch.view_as_real(z))[1:],
        (values(8, 4, 2), factors(8, 4)),
    ),
    "not contiguous": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x).t() * f).clone(),
        (values(8, 4, 2), factors(4, 1)),
    ),
    "the activation is not contiguous": (
        lambda m, x, f: torch.view_as_real(f * torch.view_as_complex(x.transpose(1, 2))).view(-1),
        (values(2, 8, 4, 4, 2), factors(2, 4, 8, 4)),
    ),
    "one number in a tensor": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x) * f),
        (values(8, 4, 2), factors(1, dtype=torch.complex128)[0]),
    ),
    "a sum": (
        lambda m, x, f: torch.view_as_real(torch.view_as_complex(x) + f),
        (values(8, 4, 2), factors(8, 4)),
    ),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_unchanged(name: str) -> None:
    function, inputs = UNCHANGED[name]
    captured = capture(Call(function), *inputs)
    count, graph = rewritten(captured)
    assert count == 0
    assert str(graph) == str(captured.graph)


def test_a_second_run_finds_nothing() -> None:
    captured = capture(Call(qwen_image), values(2, 8, 4, 16), factors(8, 8))
    _, graph = rewritten(captured)
    text = str(graph)
    assert real_rotary(graph, CONTEXT) == 0
    assert str(graph) == text


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_through_the_backend(inner: str, dynamic: bool) -> None:
    """No linear, no conversion: the pass works all the same."""
    module = Call(qwen_image)
    torch._dynamo.reset()
    options = {"inner_backend": inner}
    compiled = torch.compile(module, backend="fp8_diffusion", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        for tokens in (8, 9):
            x, freqs = values(2, tokens, 4, 16, dtype=torch.bfloat16), factors(tokens, 8)
            torch.testing.assert_close(compiled(x, freqs), module(x, freqs))
