from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fp8_compile.numerics import dequantize, quantize_rowwise, quantize_tensorwise, scaled_linear
from fp8_compile.passes.context import Constants
from fp8_compile.schemes.fp8 import Fp8
from tests.support.graphs import Call, Captured, calls, capture, plan, rand, rewritten, run, show
from tests.support.sqnr import sqnr

Function = Callable[..., Any]


class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64, bias=name == "q") for name in "qkv")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(x), self.to_k(x), self.to_v(x)


def qkv() -> Captured:
    return capture(QKV().bfloat16(), rand(2, 8, 64))


def test_one_linear() -> None:
    captured = capture(Call(lambda m, x: F.linear(x, m.proj, m.bias), proj=(32, 64), bias=(32,)), rand(8, 64))
    assert_expected_inline(
        show(captured.graph),
        """\
self.proj: bfloat16[32, 64]
self.bias: bfloat16[32]
x: bfloat16[8, 64]
linear = linear(x, self.proj, self.bias)
return (linear,)""",
    )
    gm, constants = rewritten(captured)
    assert_expected_inline(
        show(gm.graph),
        """\
self.bias: bfloat16[32]
x: bfloat16[8, 64]
proj_weight: float8_e4m3fn[32, 64]
proj_weight_scale: float32[32, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, proj_weight, proj_weight_scale, self.bias, torch.bfloat16)
return (scaled_linear,)""",
    )
    assert constants == [
        Constants("l_self_parameters_proj_", Fp8(min_m=1), False, ("proj_weight", "proj_weight_scale"))
    ]


def test_linears_with_a_scale_for_each_block() -> None:
    captured = capture(
        Call(lambda m, x: (F.linear(x, m.a, m.bias), F.linear(x[:3], m.b)), a=(304, 208), b=(32, 208), bias=(304,)),
        rand(64, 208),
    )
    gm, constants = rewritten(captured, weight_block_size=[128, 128], min_m=4)
    assert_expected_inline(
        show(gm.graph),
        """\
self.bias: bfloat16[304]
x: bfloat16[64, 208]
a_weight: float8_e4m3fn[304, 208]
a_weight_scale: float32[3, 2]
b_weight: float8_e4m3fn[32, 208]
b_weight_scale: float32[1, 2]
quantize_blockwise = quantize_blockwise(x)
blockwise_linear = blockwise_linear(quantize_blockwise, a_weight, a_weight_scale, self.bias, torch.bfloat16)
getitem = getitem(x, slice(None, 3, None))
blockwise_weight_only_linear = blockwise_weight_only_linear(getitem, b_weight, b_weight_scale, None, torch.bfloat16)
return (blockwise_linear, blockwise_weight_only_linear)""",
    )
    assert [made.scheme for made in constants] == [Fp8(weight_block_size=(128, 128), min_m=4)] * 2


def test_linears_that_share_an_activation_share_its_quantization() -> None:
    captured = qkv()
    assert_expected_inline(
        show(captured.graph),
        """\
self.to_q.weight: bfloat16[64, 64]
self.to_q.bias: bfloat16[64]
x: bfloat16[2, 8, 64]
self.to_k.weight: bfloat16[64, 64]
self.to_v.weight: bfloat16[64, 64]
linear = linear(x, self.to_q.weight, self.to_q.bias)
linear_1 = linear(x, self.to_k.weight, None)
linear_2 = linear(x, self.to_v.weight, None)
return (linear, linear_1, linear_2)""",
    )
    gm, constants = rewritten(captured)
    assert_expected_inline(
        show(gm.graph),
        """\
self.to_q.bias: bfloat16[64]
x: bfloat16[2, 8, 64]
to_q_weight: float8_e4m3fn[64, 64]
to_q_weight_scale: float32[64, 1]
to_k_weight: float8_e4m3fn[64, 64]
to_k_weight_scale: float32[64, 1]
to_v_weight: float8_e4m3fn[64, 64]
to_v_weight_scale: float32[64, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, to_q_weight, to_q_weight_scale, self.to_q.bias, torch.bfloat16)
scaled_linear_1 = scaled_linear(quantize_rowwise, to_k_weight, to_k_weight_scale, None, torch.bfloat16)
scaled_linear_2 = scaled_linear(quantize_rowwise, to_v_weight, to_v_weight_scale, None, torch.bfloat16)
return (scaled_linear, scaled_linear_1, scaled_linear_2)""",
    )
    assert [c.placeholders[0] for c in constants] == ["to_q_weight", "to_k_weight", "to_v_weight"]


def test_tensorwise() -> None:
    gm, constants = rewritten(qkv(), granularity="tensor", ignored_layers=["to_v"])
    assert_expected_inline(
        show(gm.graph),
        """\
self.to_q.bias: bfloat16[64]
x: bfloat16[2, 8, 64]
self.to_v.weight: bfloat16[64, 64]
to_q_weight: float8_e4m3fn[64, 64]
to_q_weight_scale: float32[]
to_k_weight: float8_e4m3fn[64, 64]
to_k_weight_scale: float32[]
quantize_tensorwise = quantize_tensorwise(x)
scaled_linear = scaled_linear(quantize_tensorwise, to_q_weight, to_q_weight_scale, self.to_q.bias, torch.bfloat16)
scaled_linear_1 = scaled_linear(quantize_tensorwise, to_k_weight, to_k_weight_scale, None, torch.bfloat16)
linear_2 = linear(x, self.to_v.weight, None)
return (scaled_linear, scaled_linear_1, linear_2)""",
    )
    assert {c.scheme for c in constants} == {Fp8("tensor", min_m=1)}


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = Conv1D(96, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_attn(x)

    captured = capture(Attention().bfloat16(), rand(2, 8, 64))
    gm, constants = rewritten(captured)
    assert_expected_inline(
        show(gm.graph),
        """\
x: bfloat16[2, 8, 64]
self.c_attn.bias: bfloat16[96]
c_attn_weight: float8_e4m3fn[96, 64]
c_attn_weight_scale: float32[96, 1]
view = .view(x, -1, 64)
quantize_rowwise = quantize_rowwise(view)
scaled_linear = scaled_linear(quantize_rowwise, c_attn_weight, c_attn_weight_scale, self.c_attn.bias, torch.bfloat16)
x_1 = .view(scaled_linear, (2, 8, 96))
return (x_1,)""",
    )
    assert [(c.placeholders[0], c.transposed) for c in constants] == [("c_attn_weight", True)]
    assert sqnr(captured.gm(*captured.inputs)[0], run(captured, gm, constants)[0]) > 25


def test_addmm() -> None:
    gm, _ = rewritten(capture(Call(lambda m, x: torch.addmm(m.b, x, m.w), w=(64, 32), b=(32,)), rand(8, 64)))
    assert_expected_inline(
        show(gm.graph),
        """\
self.b: bfloat16[32]
x: bfloat16[8, 64]
w_weight: float8_e4m3fn[32, 64]
w_weight_scale: float32[32, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, w_weight, w_weight_scale, self.b, torch.bfloat16)
return (scaled_linear,)""",
    )


def test_transposition_of_the_weight_goes_with_it() -> None:
    gm, _ = rewritten(capture(Call(lambda m, x: x @ m.w.to(x.dtype).t(), w=(32, 64)), rand(8, 64)))
    assert_expected_inline(
        show(gm.graph),
        """\
x: bfloat16[8, 64]
w_weight: float8_e4m3fn[32, 64]
w_weight_scale: float32[32, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, w_weight, w_weight_scale, None, torch.bfloat16)
return (scaled_linear,)""",
    )


def test_weight_of_two_linears_is_one_constant() -> None:
    gm, constants = rewritten(capture(Call(lambda m, x: F.linear(F.linear(x, m.w), m.w), w=(64, 64)), rand(8, 64)))
    assert_expected_inline(
        show(gm.graph),
        """\
x: bfloat16[8, 64]
w_weight: float8_e4m3fn[64, 64]
w_weight_scale: float32[64, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, w_weight, w_weight_scale, None, torch.bfloat16)
quantize_rowwise_1 = quantize_rowwise(scaled_linear)
scaled_linear_1 = scaled_linear(quantize_rowwise_1, w_weight, w_weight_scale, None, torch.bfloat16)
return (scaled_linear_1,)""",
    )
    assert len(constants) == 1


def test_weight_read_in_both_layouts_is_two_constants() -> None:
    captured = capture(Call(lambda m, x: F.linear(x, m.w) + x @ m.w, w=(64, 64)), rand(8, 64))
    gm, constants = rewritten(captured)
    assert_expected_inline(
        show(gm.graph),
        """\
x: bfloat16[8, 64]
w_weight: float8_e4m3fn[64, 64]
w_weight_scale: float32[64, 1]
w_weight_1: float8_e4m3fn[64, 64]
w_weight_scale_1: float32[64, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, w_weight, w_weight_scale, None, torch.bfloat16)
scaled_linear_1 = scaled_linear(quantize_rowwise, w_weight_1, w_weight_scale_1, None, torch.bfloat16)
add = add(scaled_linear, scaled_linear_1)
return (add,)""",
    )
    assert [(c.weight, c.transposed) for c in constants] == [
        ("l_self_parameters_w_", False),
        ("l_self_parameters_w_", True),
    ]
    assert len({name for c in constants for name in c.placeholders}) == 4
    assert sqnr(captured.gm(*captured.inputs)[0], run(captured, gm, constants)[0]) > 25


def test_weight_that_something_else_reads_keeps_its_placeholder() -> None:
    module = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)).bfloat16()
    module[1].weight = module[0].weight
    captured = capture(module, torch.arange(8))
    gm, constants = rewritten(captured)
    assert_expected_inline(
        show(gm.graph),
        """\
fn.0.weight: bfloat16[32, 64]
args.0: int64[8]
_1_weight: float8_e4m3fn[32, 64]
_1_weight_scale: float32[32, 1]
input_1 = embedding(args.0, fn.0.weight, None, None, 2.0, False, False)
quantize_rowwise = quantize_rowwise(input_1)
scaled_linear = scaled_linear(quantize_rowwise, _1_weight, _1_weight_scale, None, torch.bfloat16)
return (scaled_linear,)""",
    )
    assert sqnr(captured.gm(*captured.inputs)[0], run(captured, gm, constants)[0]) > 25


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (F.linear(x, m.w), m.w.sum()),
        lambda m, x: (x @ m.w.t(), m.w.t()),
        lambda m, x: (lambda t: (x @ t, t))(m.w.t()),
        lambda m, x: (F.linear(x, m.w), F.linear(x[0], m.w.clone())),
    ],
)
def test_weight_with_another_reader_stays_an_input(function: Function) -> None:
    captured = capture(Call(function, w=(64, 64)), rand(8, 64))
    gm, constants = rewritten(captured)
    assert "l_self_parameters_w_" in [n.name for n in gm.graph.find_nodes(op="placeholder")]
    direct, other = captured.gm(*captured.inputs)
    linear, same = run(captured, gm, constants)
    assert sqnr(direct, linear) > 25
    torch.testing.assert_close(same, other, rtol=0, atol=0)


def test_kept_linear_keeps_its_weight_and_reads_the_activation_itself() -> None:
    gm, constants = rewritten(qkv(), ignored_layers=["to_k"])
    assert_expected_inline(
        show(gm.graph),
        """\
self.to_q.bias: bfloat16[64]
x: bfloat16[2, 8, 64]
self.to_k.weight: bfloat16[64, 64]
to_q_weight: float8_e4m3fn[64, 64]
to_q_weight_scale: float32[64, 1]
to_v_weight: float8_e4m3fn[64, 64]
to_v_weight_scale: float32[64, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, to_q_weight, to_q_weight_scale, self.to_q.bias, torch.bfloat16)
linear_1 = linear(x, self.to_k.weight, None)
scaled_linear_1 = scaled_linear(quantize_rowwise, to_v_weight, to_v_weight_scale, None, torch.bfloat16)
return (scaled_linear, linear_1, scaled_linear_1)""",
    )
    assert [c.placeholders[0] for c in constants] == ["to_q_weight", "to_v_weight"]


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_counts(granularity: str) -> None:
    """Three activations: x for q, k and v, the input of the MLP, and what lies between its two linears."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = QKV()
            self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)
            return self.mlp(q * k + v)

    captured = capture(Block().bfloat16(), rand(2, 8, 64))
    gm, constants = rewritten(captured, granularity=granularity)
    quantize = {"row": quantize_rowwise, "tensor": quantize_tensorwise}[granularity]
    assert len(calls(gm.graph, quantize)) == 3
    assert len(calls(gm.graph, scaled_linear)) == len(constants) == 5
    assert calls(gm.graph, F.linear) == []
    assert len(calls(captured.graph, F.linear)) == 5


@pytest.mark.parametrize("options", [{}, {"ignored_layers": ["to_q"]}, {"granularity": "tensor"}], ids=str)
def test_second_time_changes_nothing(options: dict[str, Any]) -> None:
    gm, _ = rewritten(qkv(), **options)
    again = plan(gm, **options)
    assert again.quantized == ()
    assert len(again.decisions) == len(options.get("ignored_layers", ()))
    gm_again, constants = rewritten(gm, **options)
    assert constants == []
    assert str(gm_again.graph) == str(gm.graph)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (QKV().bfloat16(), {"ignored_layers": ["re:."]}),
        (QKV().bfloat16(), {"min_features": 65}),
        (QKV().bfloat16(), {"min_m": 17, "small_m": "keep"}),
        (Call(lambda m, x: (x @ x.mT, x.relu_(), F.silu(x, True))), {}),
        (Call(lambda m, x: F.linear(x, m.w * 2), w=(64, 64)), {}),
        (Call(lambda m, x: torch.cond(x.sum() > 0, lambda x: F.linear(x, m.w), torch.sin, (x,)), w=(64, 64)), {}),
    ],
    ids=["ignored", "narrow", "few rows", "no linear", "computed weight", "inside cond"],
)
def test_unchanged(model: nn.Module, options: dict[str, Any]) -> None:
    captured = capture(model, rand(2, 8, 64))
    gm, constants = rewritten(captured, **options)
    assert constants == []
    assert str(gm.graph) == str(captured.graph)


def _between(statement: str) -> Captured:
    """The graph of two linears of one activation x (and a view of it, v) with ``statement`` in between."""
    defined: dict[str, Function] = {}
    body = f"v = x.view(-1)\n    q = F.linear(x, m.w)\n    {statement}\n    return q, F.linear(x, m.u), v"
    exec(f"def function(m, x, y):\n    {body}", {"torch": torch, "F": F}, defined)
    return capture(Call(defined["function"], w=(64, 64), u=(64, 64)), rand(8, 64), rand(8, 64))


def test_activation_modified_between_two_linears() -> None:
    gm, _ = rewritten(_between("x.add_(y)"))
    assert_expected_inline(
        show(gm.graph),
        """\
x: bfloat16[8, 64]
more.0: bfloat16[8, 64]
w_weight: float8_e4m3fn[64, 64]
w_weight_scale: float32[64, 1]
u_weight: float8_e4m3fn[64, 64]
u_weight_scale: float32[64, 1]
v = .view(x, -1)
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, w_weight, w_weight_scale, None, torch.bfloat16)
add_ = .add_(x, more.0)
quantize_rowwise_1 = quantize_rowwise(x)
scaled_linear_1 = scaled_linear(quantize_rowwise_1, u_weight, u_weight_scale, None, torch.bfloat16)
return (scaled_linear, scaled_linear_1, v)""",
    )


@pytest.mark.parametrize(
    "statement",
    [
        "x.add_(1)",
        "x += 1",
        "x *= y",
        "x[0] = 1",
        "x.copy_(y)",
        "torch.relu_(x)",
        "F.relu(x, inplace=True)",
        "F.relu(x, True)",
        "F.silu(x, True)",
        "torch.add(x, y, out=x)",
        "torch._foreach_mul_([x], 2)",
        "torch.ops.aten.mul_(x, 2)",
        "x.view(-1).mul_(2)",
        "x.t().mul_(2)",
        "x[2:4].fill_(3)",
        "x.T[0] = 5",
        "v.mul_(2)",
        "v[3] = 7",
    ],
)
def test_modified_activation_is_quantized_again(statement: str) -> None:
    captured = _between(statement)
    gm, constants = rewritten(captured)
    assert len(calls(gm.graph, quantize_rowwise)) == 2
    # The captured inputs have been written into by the capture itself; both sides start from the same values here.
    start = [value.clone() for value in captured.inputs]
    direct = captured.gm(*(value.clone() for value in start))
    computed = run(Captured(captured.gm, start), gm, constants)
    for expected, value in zip(direct[:2], computed[:2], strict=True):
        assert sqnr(expected, value) > 25
    torch.testing.assert_close(computed[2], direct[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    "statement", ["z = x + 1", "z = x[0]", "z = torch.add(x, 1)", "z = torch.cat((x, y), 1)", "z = F.silu(x, False)"]
)
def test_activation_only_read_is_quantized_once(statement: str) -> None:
    gm, _ = rewritten(_between(statement))
    assert len(calls(gm.graph, quantize_rowwise)) == 1


def test_in_place_operation_without_a_reader_stays() -> None:
    """Its effect is the caller's to see; as a node without users it looks dead."""

    def function(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        q = F.linear(x, m.w)
        y.add_(1)
        y[0] = 2
        torch.relu_(y)
        F.silu(y, True)
        return q

    captured = capture(Call(function, w=(64, 64)), rand(8, 64), rand(8, 64))
    gm, constants = rewritten(captured)
    assert_expected_inline(
        show(gm.graph),
        """\
x: bfloat16[8, 64]
more.0: bfloat16[8, 64]
w_weight: float8_e4m3fn[64, 64]
w_weight_scale: float32[64, 1]
quantize_rowwise = quantize_rowwise(x)
scaled_linear = scaled_linear(quantize_rowwise, w_weight, w_weight_scale, None, torch.bfloat16)
add_ = .add_(more.0, 1)
setitem = setitem(more.0, 0, 2)
relu_ = relu_(more.0)
silu = silu(more.0, True)
return (scaled_linear,)""",
    )
    expected, written = rand(8, 64), rand(8, 64)
    function(Call(function, w=(64, 64)), rand(8, 64), expected)
    x = rand(8, 64)
    values = {"l_self_parameters_w_": rand(64, 64), "l_x_": x, "l_more_0_": written}
    inputs = [values[node.name] for node in captured.graph.find_nodes(op="placeholder")]
    run(Captured(captured.gm, inputs), gm, constants)
    torch.testing.assert_close(written, expected, rtol=0, atol=0)


def test_original_is_not_touched() -> None:
    captured = qkv()
    captured.gm.meta["mark"] = object()
    text, code = str(captured.graph), captured.gm.code
    metas = [(node, dict(node.meta)) for node in captured.graph.nodes]
    tensor_dicts = [dict(node.meta["tensor_dict"]) for node in captured.graph.find_nodes(op="placeholder")]
    gm, constants = rewritten(captured)
    assert len(constants) == 3
    assert str(captured.graph) == text
    assert captured.gm.code == code
    assert [(node, node.meta) for node in captured.graph.nodes] == metas
    assert [node.meta["tensor_dict"] for node in captured.graph.find_nodes(op="placeholder")] == tensor_dicts
    assert gm is not captured.gm
    assert gm.meta["mark"] is captured.gm.meta["mark"]
    assert gm._param_name_to_source == captured.gm._param_name_to_source


def test_remaining_placeholders_keep_source_and_order() -> None:
    captured = qkv()
    gm, constants = rewritten(captured, ignored_layers=["to_k"])
    new = [name for c in constants for name in c.placeholders]
    before = {node.name: node for node in captured.graph.find_nodes(op="placeholder")}
    after = gm.graph.find_nodes(op="placeholder")
    converted = [c.weight for c in constants]
    assert [n.name for n in after] == [name for name in before if name not in converted] + new
    for node in after[: -len(new)]:
        assert node._dynamo_source is before[node.name]._dynamo_source is not None
        assert node.meta == before[node.name].meta


@pytest.mark.parametrize(("granularity", "scale_shape"), [("row", (32, 1)), ("tensor", ())], ids=["row", "tensor"])
@pytest.mark.parametrize("transposed", [False, True])
def test_new_placeholders(granularity: str, scale_shape: tuple[int, ...], transposed: bool) -> None:
    """Static inputs to Dynamo and Inductor, and fakes of the graph's own mode: nothing real may be computed here."""
    function = (lambda m, x: x @ m.w) if transposed else (lambda m, x: F.linear(x, m.w))
    captured = capture(Call(function, w=(64, 32) if transposed else (32, 64)), rand(8, 64))
    gm, (constant,) = rewritten(captured, granularity=granularity)
    x, *new = gm.graph.find_nodes(op="placeholder")
    assert tuple(n.name for n in new) == constant.placeholders == ("w_weight", "w_weight_scale")
    for node in new:
        assert node.target == node.name
        assert node._dynamo_source is None
        assert node.meta["tensor_dict"] == {"_dynamo_static_input_type": "unguarded"}
        assert isinstance(node.meta["example_value"], FakeTensor)
        assert node.meta["example_value"].fake_mode is x.meta["example_value"].fake_mode
        assert not isinstance(node.meta["example_value"], nn.Parameter)
        assert not node.meta["example_value"].requires_grad
    weight, scale = (n.meta["example_value"] for n in new)
    assert (weight.dtype, tuple(weight.shape), weight.is_contiguous()) == (torch.float8_e4m3fn, (32, 64), True)
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, scale_shape)


def test_new_nodes_say_where_they_come_from() -> None:
    captured = qkv()
    gm, _ = rewritten(captured)
    linears = calls(captured.graph, F.linear)
    assert all("to_" in str(node.meta["nn_module_stack"]) for node in linears)
    for old, new in zip(linears, calls(gm.graph, scaled_linear), strict=True):
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            assert new.meta[key] == old.meta[key]
        assert new.meta["example_value"] is old.meta["example_value"]
    (quantize,) = calls(gm.graph, quantize_rowwise)
    assert quantize.meta["nn_module_stack"] == linears[0].meta["nn_module_stack"]


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_rewritten_graph_computes_what_the_numerics_say(granularity: str, dtype: torch.dtype, bias: bool) -> None:
    module, x = nn.Linear(64, 32, bias).to(dtype), rand(2, 8, 64, dtype=dtype)
    captured = capture(module, x)
    gm, constants = rewritten(captured, granularity=granularity)
    (out,) = run(captured, gm, constants)
    quantize = {"row": quantize_rowwise, "tensor": quantize_tensorwise}[granularity]
    with torch.no_grad():
        direct = scaled_linear(quantize(x), *quantize(module.weight), module.bias, dtype)
        operands = (dequantize(*quantize(t), torch.float64) for t in (x, module.weight))
        reference = F.linear(*operands, module.bias.double() if bias else None)
    assert out.dtype == dtype
    torch.testing.assert_close(out, direct, rtol=0, atol=0)
    assert sqnr(reference, out) > 45
    assert 25 < sqnr(module(x), out) < 45


CALLS: dict[str, tuple[Function, dict[str, tuple[int, ...]]]] = {
    "vector": (lambda m, x, o: F.linear(x[0], m.w, m.b), {"w": (32, 64), "b": (32,)}),
    "expanded": (lambda m, x, o: F.linear(x.expand(4, 8, 64), m.w, m.b), {"w": (32, 64), "b": (32,)}),
    "transposed": (lambda m, x, o: F.linear(x.t().contiguous().t(), m.w), {"w": (32, 64)}),
    "two parameters": (lambda m, x, o: x @ (m.u @ m.w), {"u": (64, 64), "w": (64, 32)}),
    "float16 result": (lambda m, x, o: F.linear(x, m.w).half(), {"w": (32, 64)}),
    "bias of one": (lambda m, x, o: F.linear(x, m.w, m.b), {"w": (32, 64), "b": (1,)}),
    "bias scalar": (lambda m, x, o: F.linear(x, m.w, m.b), {"w": (32, 64), "b": ()}),
    "bias matrix": (lambda m, x, o: F.linear(x, m.w, m.b), {"w": (32, 64), "b": (8, 32)}),
    "addmm of one": (lambda m, x, o: torch.addmm(m.b, x, m.w), {"w": (64, 32), "b": (1,)}),
    "out": (lambda m, x, o: (torch.mm(x, m.w, out=o), o)[1], {"w": (64, 32)}),
    "out, transposed": (lambda m, x, o: (torch.mm(x, m.w.t(), out=o), o)[1], {"w": (32, 64)}),
    "weight scaled in place": (lambda m, x, o: (m.w.t().mul_(2), F.linear(x, m.w))[1], {"w": (32, 64)}),
}


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_result(name: str, granularity: str) -> None:
    """Unusual calls are converted and right, or kept and right."""
    function, shapes = CALLS[name]
    options = {"inner_backend": "aot_eager", "min_features": 1, "min_m": 1, "granularity": granularity}
    with torch.no_grad():
        expected = Call(function, **shapes)(rand(8, 64), torch.zeros(8, 32, dtype=torch.bfloat16))
        compiled = torch.compile(Call(function, **shapes), backend="fp8_diffusion", fullgraph=True, options=options)
        result = compiled(rand(8, 64), torch.zeros(8, 32, dtype=torch.bfloat16))
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert sqnr(expected, result) > 22


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_no_rows(granularity: str) -> None:
    options = {"inner_backend": "aot_eager", "min_features": 1, "min_m": 1, "granularity": granularity}
    compiled = torch.compile(nn.Linear(64, 32).bfloat16(), backend="fp8_diffusion", dynamic=False, options=options)
    with torch.no_grad():
        assert compiled(rand(0, 64)).shape == (0, 32)


def test_autocast() -> None:
    """The weight is BF16, the activation float32, the result what autocast makes of them."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, m.w, m.b)

    module, x = Call(function, w=(32, 64), b=(32,)), rand(8, 64, dtype=torch.float32)
    captured = capture(module, x)
    gm, constants = rewritten(captured)
    (result,) = run(captured, gm, constants)
    assert len(constants) == 1
    assert result.dtype == torch.bfloat16
    assert sqnr(module(x), result) > 25
