from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import Graph

from fp8_compile.passes.graphs import copy_graph, example, module_of
from fp8_compile.passes.rotary_pairs import rotary_pairs
from tests.support.graphs import CONTEXT, Call, Captured, calls, capture, rand, show

Function = Callable[..., Any]
BF16, F32 = torch.bfloat16, torch.float32


def flux(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_emb(x, (cos, sin), sequence_dim=1)  # type: ignore[return-value]


def flux_double(m: Any, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return flux(m, torch.cat([text, image], dim=1), cos, sin)


def wan(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in the attention of diffusers' Wan, whose own is inside a method."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * c - b * s
    out[..., 1::2] = a * s + b * c
    return out.type_as(x)


X, TEXT, IMAGE = rand(2, 6, 4, 16), rand(2, 2, 4, 16), rand(2, 4, 4, 16)
TABLES = rand(6, 16, dtype=F32), rand(6, 16, dtype=F32).flip(0)
WAN = rand(1, 6, 1, 16, dtype=F32), rand(1, 6, 1, 16, dtype=F32).flip(1)


def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x.float() * cos + torch.stack([-b, a], dim=-1).flatten(3).float() * sin


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotation(x, cos, sin).to(x.dtype)


def cast_before(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.float()
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x * cos + torch.stack([-b, a], dim=-1).flatten(3) * sin).to(torch.bfloat16)


def rewritten(captured: Captured) -> tuple[int, Graph]:
    graph = copy_graph(captured.gm)
    return rotary_pairs(graph, CONTEXT), graph


def assert_same_bits(captured: Captured, graph: Graph) -> None:
    inputs = [[x.clone() for x in captured.inputs] for _ in range(2)]
    for ours, theirs in zip(module_of(graph, captured.gm)(*inputs[0]), captured.gm(*inputs[1]), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_flux() -> None:
    captured = capture(Call(flux), X, *TABLES)
    count, graph = rewritten(captured)
    assert count == 1
    assert_expected_inline(
        show(graph),
        """\
more.0: float32[6, 16]
more.1: float32[6, 16]
x: bfloat16[2, 6, 4, 16]
cos = getitem(more.0, (None, slice(None, None, None), None, slice(None, None, None)))
sin = getitem(more.1, (None, slice(None, None, None), None, slice(None, None, None)))
cos_1 = .to(cos, cpu)
sin_1 = .to(sin, cpu)
float_3 = .float(x)
unflatten = unflatten(float_3, -1, (-1, 2))
unflatten_1 = unflatten(cos_1, -1, (-1, 2))
unflatten_2 = unflatten(sin_1, -1, (-1, 2))
arange = arange(2, device=cpu)
mul_2 = mul(arange, 2)
sub = sub(mul_2, 1)
flip = flip(unflatten, (-1,))
mul_3 = mul(unflatten_2, sub)
mul_4 = mul(flip, mul_3)
mul_5 = mul(unflatten, unflatten_1)
add_1 = add(mul_5, mul_4)
flatten = flatten(add_1, -2)
to = .to(flatten, torch.bfloat16)
return (to,)""",
    )
    assert_same_bits(captured, graph)


def test_a_concatenation_comes_after_the_rotation() -> None:
    captured = capture(Call(flux_double), TEXT, IMAGE, *TABLES)
    count, graph = rewritten(captured)
    assert count == 1
    assert_expected_inline(
        show(graph),
        """\
x: bfloat16[2, 2, 4, 16]
more.0: bfloat16[2, 4, 4, 16]
more.1: float32[6, 16]
more.2: float32[6, 16]
cos = getitem(more.1, (None, slice(None, None, None), None, slice(None, None, None)))
sin = getitem(more.2, (None, slice(None, None, None), None, slice(None, None, None)))
cos_1 = .to(cos, cpu)
sin_1 = .to(sin, cpu)
narrow = narrow(cos_1, 1, 0, 2)
narrow_1 = narrow(sin_1, 1, 0, 2)
float_3 = .float(x)
unflatten = unflatten(float_3, -1, (-1, 2))
unflatten_1 = unflatten(narrow, -1, (-1, 2))
unflatten_2 = unflatten(narrow_1, -1, (-1, 2))
arange = arange(2, device=cpu)
mul_2 = mul(arange, 2)
sub = sub(mul_2, 1)
flip = flip(unflatten, (-1,))
mul_3 = mul(unflatten_2, sub)
mul_4 = mul(flip, mul_3)
mul_5 = mul(unflatten, unflatten_1)
add_1 = add(mul_5, mul_4)
flatten = flatten(add_1, -2)
to = .to(flatten, torch.bfloat16)
narrow_2 = narrow(cos_1, 1, 2, 4)
narrow_3 = narrow(sin_1, 1, 2, 4)
float_4 = .float(more.0)
unflatten_3 = unflatten(float_4, -1, (-1, 2))
unflatten_4 = unflatten(narrow_2, -1, (-1, 2))
unflatten_5 = unflatten(narrow_3, -1, (-1, 2))
arange_1 = arange(2, device=cpu)
mul_6 = mul(arange_1, 2)
sub_1 = sub(mul_6, 1)
flip_1 = flip(unflatten_3, (-1,))
mul_7 = mul(unflatten_5, sub_1)
mul_8 = mul(flip_1, mul_7)
mul_9 = mul(unflatten_3, unflatten_4)
add_2 = add(mul_9, mul_8)
flatten_1 = flatten(add_2, -2)
to_1 = .to(flatten_1, torch.bfloat16)
cat_1 = cat((to, to_1), dim=1)
return (cat_1,)""",
    )
    assert_same_bits(captured, graph)


def test_wan() -> None:
    captured = capture(Call(wan), X, *WAN)
    count, graph = rewritten(captured)
    assert count == 1
    assert_expected_inline(
        show(graph),
        """\
x: bfloat16[2, 6, 4, 16]
more.0: float32[1, 6, 1, 16]
more.1: float32[1, 6, 1, 16]
c = getitem(more.0, (Ellipsis, slice(0, None, 2)))
s = getitem(more.1, (Ellipsis, slice(1, None, 2)))
unflatten_1 = unflatten(x, -1, (-1, 2))
unsqueeze = unsqueeze(c, -1)
unsqueeze_1 = unsqueeze(s, -1)
arange = arange(2, device=cpu)
mul_4 = mul(arange, 2)
sub_1 = sub(mul_4, 1)
flip = flip(unflatten_1, (-1,))
mul_5 = mul(unsqueeze_1, sub_1)
mul_6 = mul(flip, mul_5)
mul_7 = mul(unflatten_1, unsqueeze)
add_1 = add(mul_7, mul_6)
flatten = flatten(add_1, -2)
to = .to(flatten, torch.bfloat16)
type_as = .type_as(to, x)
return (type_as,)""",
    )
    assert_same_bits(captured, graph)


TABLES4 = tuple(t[None, :, None] for t in TABLES)
REWRITTEN: dict[str, tuple[Function, tuple[Tensor, ...], int]] = {
    "queries and keys": (lambda m, q, k, *t: (flux(m, q, *t), flux(m, k, *t)), (X, X + 1, *TABLES), 2),
    "queries and keys of Wan": (lambda m, q, k, *t: (wan(m, q, *t), wan(m, k, *t)), (X, X + 1, *WAN), 2),
    "float32": (flux, (X.float(), *TABLES), 1),
    "tables in double precision": (wan, (X, *(t.double() for t in WAN)), 1),
    "one table for all": (flux_double, (TEXT, IMAGE, *(t[:1] for t in TABLES)), 1),
    "three parts": (
        lambda m, a, b, *t: flux(m, torch.cat([a, b[:, :1], b[:, 1:]], 1), *t),
        (TEXT, IMAGE, *TABLES),
        1,
    ),
    "without a cast": (
        lambda m, x, cos, sin: (
            x.float() * cos
            + torch.stack([-(p := x.reshape(2, 6, 4, -1, 2).unbind(-1))[1], p[0]], dim=-1).flatten(3).float() * sin
        ),
        (X, *(t[:, None].expand(6, 4, 16)[None] for t in TABLES)),
        1,
    ),
    "the concatenation has another reader": (
        lambda m, a, b, *t: (x := torch.cat([a, b], 1), flux(m, x, *t), x.sum())[1:],
        (TEXT, IMAGE, *TABLES),
        1,
    ),
    "the result has several readers": (lambda m, *a: (y := flux(m, *a), y + 1, y * 2), (X, *TABLES), 1),
    "cast before it is taken apart": (cast_before, (X, *TABLES4), 1),
    "a cast of something else to its dtype": (
        lambda m, x, c, s, other: other.type_as(rotation(x, c, s)),
        (X, *TABLES4, X.double()),
        1,
    ),
    "one after the other, on a concatenation": (
        lambda m, a, b, c, s: rope(rope(torch.cat([a, b], 1), c, s), c, s),
        (TEXT, IMAGE, *TABLES4),
        2,
    ),
    "the concatenation broadcasts to the tables": (
        lambda m, a, c, s: rope(torch.cat([a], dim=1), c, s),
        (TEXT[:, :1], *TABLES4),
        1,
    ),
    "the batch is concatenated, and broadcasts": (
        lambda m, a, b, c, s: rope(torch.cat([a, b], dim=0), c, s),
        (X[:1], X[:0], *(t.expand(3, -1, -1, -1).contiguous() for t in TABLES4)),
        1,
    ),
    "the concatenation's dimension by another name": (
        lambda m, a, b, c, s: rope(torch.cat([a, b], axis=1), c, s),  # type: ignore[call-overload]
        (TEXT, IMAGE, *TABLES4),
        1,
    ),
    "the concatenation is a table as well": (
        lambda m, a, b, s: rope(x := torch.cat([a, b], 1), x, s),
        (TEXT, IMAGE, TABLES4[1]),
        1,
    ),
    "written before and after": (
        lambda m, x, *t: (x.mul_(2), flux(m, x, *t), x.add_(1))[1:],
        (X, *TABLES),
        1,
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name: str) -> None:
    function, inputs, expected = REWRITTEN[name]
    captured = capture(Call(function), *(x.clone() for x in inputs))
    count, graph = rewritten(captured)
    assert count == expected
    assert calls(graph, torch.stack) == []
    assert calls(graph, torch.empty_like) == []
    assert_same_bits(captured, graph)


def test_a_concatenation_that_others_read_stays_in_front() -> None:
    function, inputs, _ = REWRITTEN["the concatenation has another reader"]
    _, graph = rewritten(capture(Call(function), *inputs))
    (cat,) = calls(graph, torch.cat)
    assert example(cat.args[0][0]).shape == (2, 2, 4, 16)  # type: ignore[index]
    assert cat.args[0][0].op == "placeholder"  # type: ignore[index, union-attr]


def by_hand(x: Tensor, cos: Tensor, sin: Tensor, other: Callable[[Tensor], Any]) -> Any:
    a, b = x.reshape(2, 6, 4, -1, 2).unbind(-1)
    rotated = torch.stack([-b, a], dim=-1).flatten(3)
    seen = other(rotated)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype), seen


UNCHANGED: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "of integers": (
        lambda m, x, c, s: rotation(x, c, s),
        (torch.arange(2 * 6 * 4 * 16, dtype=torch.uint8).view(2, 6, 4, 16), *TABLES4),
    ),
    "halves in another order": (
        lambda m, x, cos, sin: (
            x * cos + torch.stack([(p := x.unflatten(-1, (-1, 2)).unbind(-1))[1], -p[0]], dim=-1).flatten(3) * sin
        ),
        (X, *TABLES4),
    ),
    "half of a head and the other": (
        lambda m, x, cos, sin: apply_rotary_emb(x, (cos, sin), sequence_dim=1, use_real_unbind_dim=-2),
        (X, *TABLES),
    ),
    "not contiguous": (
        lambda m, x, cos, sin: apply_rotary_emb(x.transpose(1, 2), (cos, sin), sequence_dim=2),
        (X, *TABLES),
    ),
    "something else reads the pairs": (lambda m, x, c, s: by_hand(x, c, s, lambda r: r + 1), (X, *TABLES4)),
    "written in between": (
        lambda m, x, c, s: by_hand(x, c, s, lambda r: x.add_(1)),
        (X, *TABLES4),
    ),
    "tables of half the width": (
        lambda m, x, c, s: by_hand(x, c[..., :1], s[..., :1], lambda r: None)[0],
        (X, *TABLES4),
    ),
    "one half is assigned": (
        lambda m, x, c, s: (
            p := x.unflatten(-1, (-1, 2)).unbind(-1),
            out := torch.zeros_like(x),
            out.__setitem__((..., slice(1, None, 2)), p[0] * s + p[1] * c),
            out,
        )[-1],
        (X, *(t[..., :8] for t in WAN)),
    ),
    "read between the halves": (
        lambda m, x, c, s: (
            p := x.unflatten(-1, (-1, 2)).unbind(-1),
            out := torch.empty_like(x),
            out.__setitem__((..., slice(0, None, 2)), p[0] * c - p[1] * s),
            first := out[..., 0] + 1,
            out.__setitem__((..., slice(1, None, 2)), p[0] * s + p[1] * c),
            (out, first),
        )[-1],
        (X, *(t[..., :8] for t in WAN)),
    ),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_unchanged(name: str) -> None:
    function, inputs = UNCHANGED[name]
    captured = capture(Call(function), *(x.clone() for x in inputs))
    count, graph = rewritten(captured)
    assert count == 0
    assert str(graph) == str(captured.graph)


@pytest.mark.parametrize(
    "rotated",
    [
        lambda a, b, out: torch.stack(tensors=[-b, a], dim=-1).flatten(3),
        lambda a, b, out: torch.stack([-b, a], dim=-1, out=out).flatten(3),
        lambda a, b, out: torch.flatten(input=torch.stack([-b, a], dim=-1), start_dim=3),
        lambda a, b, out: torch.stack([torch.neg(input=b), a], dim=-1).flatten(3),
    ],
)
def test_arguments_by_name_are_left_alone(rotated: Any) -> None:
    def function(m: Any, x: Tensor, c: Tensor, s: Tensor, out: Tensor) -> Tensor:
        a, b = x.reshape(2, 6, 4, -1, 2).unbind(-1)
        return x.float() * c + rotated(a, b, out).float() * s

    captured = capture(Call(function), X, *TABLES4, torch.empty(2, 6, 4, 8, 2).bfloat16())
    assert rewritten(captured)[0] == 0


def test_a_part_of_a_concatenation_that_is_written_into_meanwhile() -> None:
    def function(m: Any, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = torch.cat([text, image], dim=1)
        text.add_(1)
        return flux(m, x, cos, sin)

    captured = capture(Call(function), TEXT.clone(), IMAGE, *TABLES)
    count, _ = rewritten(captured)
    assert count == 0


def test_sizes_known_only_at_run_time() -> None:
    captured = capture(Call(flux_double), TEXT, IMAGE, *TABLES, dynamic=True)
    count, graph = rewritten(captured)
    assert count == 1
    (cat,) = calls(graph, torch.cat)
    assert [part.target for part in cat.args[0]] == ["to", "to"]  # type: ignore[union-attr]
    assert len(calls(graph, torch.narrow)) == 4


def test_a_second_run_finds_nothing() -> None:
    for function, inputs in ((flux, (X, *TABLES)), (wan, (X, *WAN))):
        _, graph = rewritten(capture(Call(function), *inputs))
        text = str(graph)
        assert rotary_pairs(graph, CONTEXT) == 0
        assert str(graph) == text


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_through_the_backend(inner: str, dynamic: bool) -> None:
    """No linear, no conversion: the pass works all the same."""
    module = Call(lambda m, a, b, c, s: (flux_double(m, a, b, c, s), wan(m, a, c[None, :2, None], s[None, :2, None])))
    torch._dynamo.reset()
    options = {"inner_backend": inner}
    compiled = torch.compile(module, backend="fp8_diffusion", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad():
        for tokens in (5, 6, 7):
            inputs = TEXT, rand(2, tokens, 4, 16), *(rand(2 + tokens, 16, dtype=F32) for _ in range(2))
            with torch._dynamo.config.patch(error_on_recompile=dynamic and tokens > 5):
                got = compiled(*inputs)
            for ours, theirs in zip(got, module(*inputs), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)
