from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from fp8_compile import Fp8Options
from fp8_compile.passes.context import Decision
from fp8_compile.schemes import Call as How
from fp8_compile.schemes.fp8 import (
    BLOCKS,
    DEQUANTIZED_BLOCKS,
    ROWWISE,
    ROWWISE_UNFUSED_SCALES,
    TENSORWISE,
    WEIGHT_ONLY,
    Fp8,
)
from tests.support.graphs import Call, capture, plan, rand

Function = Callable[..., Any]


def decide(model: Callable[..., Any], *args: Any, dynamic: bool = False, **options: Any) -> list[Decision]:
    return list(plan(capture(model, *args, dynamic=dynamic), **options).decisions)


def reason(model: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Why the only linear is kept."""
    (decision,) = decide(model, *args, **options)
    assert (decision.decision == "unquantized") == bool(decision.reason)
    return decision.reason


def linear(in_features: int = 64, out_features: int = 64, bias: bool = True) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias).bfloat16()


def test_default_decision() -> None:
    assert decide(nn.Sequential(linear(64, 32)), rand(8, 64)) == [
        Decision(
            node="input_1",
            path="0",
            within="0",
            in_features=64,
            out_features=32,
            weight="l_fn_modules_0_parameters_weight_",
            transposed=False,
            decision="quantized",
            scheme=Fp8(min_m=1),
            call=ROWWISE,
            rows=8,
            verdict="converts",
        )
    ]


def test_features_of_a_weight_stored_input_features_first() -> None:
    (decision,) = decide(Call(lambda m, x: torch.addmm(m.b, x, m.w), w=(64, 32), b=(32,)), rand(8, 64))
    assert (decision.in_features, decision.out_features) == (64, 32)
    assert decision.transposed
    assert decision.decision == "quantized"


@pytest.mark.parametrize(
    ("in_features", "out_features", "options", "expected"),
    [
        (255, 512, {"min_features": 256}, "narrower than min_features 256"),
        (512, 240, {"min_features": 256}, "narrower than min_features 256"),
        (256, 256, {"min_features": 256}, ""),
        (64, 72, {}, "out_features 72 is not a multiple of 16"),
        (72, 64, {}, "in_features 72 is not a multiple of 16"),
        (72, 72, {}, "in_features 72 is not a multiple of 16"),
        (72, 64, {"granularity": "tensor"}, "in_features 72 is not a multiple of 16"),
        (64, 64, {"min_m": 9, "small_m": "keep"}, "M is below min_m 9"),
        (64, 64, {"min_m": 8}, ""),
    ],
)
def test_sizes(in_features: int, out_features: int, options: dict[str, Any], expected: str) -> None:
    assert reason(linear(in_features, out_features), rand(2, 4, in_features), **options) == expected


def test_defaults_of_the_sizes() -> None:
    """256 features and 8 rows; with fewer rows, the weight alone is in FP8."""
    captured = capture(nn.Sequential(linear(256, 256), linear(256, 240)), rand(8, 256))
    default = {"min_features": Fp8Options.min_features, "min_m": Fp8.min_m}
    assert [d.reason for d in plan(captured, **default).decisions] == ["", "narrower than min_features 256"]
    captured = capture(linear(256, 256), rand(7, 256))
    assert [d.call for d in plan(captured, **default).decisions] == [WEIGHT_ONLY]


def test_one_row() -> None:
    assert reason(linear(), rand(64)) == ""
    assert reason(linear(), rand(64), min_m=2, small_m="keep") == "M is below min_m 2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_types(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert reason(nn.Linear(64, 64).to(dtype), rand(8, 64).to(dtype)) == f"weight is {name}, not bfloat16 or float16"


def test_float16_is_converted() -> None:
    assert reason(nn.Linear(64, 64).half(), rand(8, 64).half()) == ""


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.w * 2),
        lambda m, x: F.linear(x, m.w.clone()),
        lambda m, x: F.linear(x, m.buffer),
        lambda m, x: F.linear(x, m.buffer.t().t()),
        lambda m, x: F.linear(x, m.wide[:64]),
    ],
)
def test_weight_is_no_parameter(function: Function) -> None:
    module = Call(function, w=(64, 64), wide=(128, 64))
    module.register_buffer("buffer", rand(64, 64))
    (decision,) = decide(module, rand(8, 64))
    assert decision.reason == "weight is computed at each call, so it cannot be quantized once"
    assert decision.weight is None
    assert (decision.in_features, decision.out_features) == (64, 64)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, (m.w * 2).t()),
        lambda m, x: F.linear(x, m.buffer.t()),
        lambda m, x: F.linear(x, m.w.clone().T.contiguous()),
    ],
)
def test_features_of_a_transposed_weight_that_is_no_parameter(function: Function) -> None:
    module = Call(function, w=(64, 32))
    module.register_buffer("buffer", rand(64, 32))
    (decision,) = decide(module, rand(8, 64))
    assert decision.reason == "weight is computed at each call, so it cannot be quantized once"
    assert (decision.in_features, decision.out_features) == (64, 32)


def test_vector_as_weight() -> None:
    """`F.linear` takes ``[K]`` too, and reduces the last dimension."""
    (decision,) = decide(Call(lambda m, x: F.linear(x, m.w), w=(64,)), rand(8, 64))
    assert decision.decision == "unquantized"
    (decision,) = decide(Call(lambda m, x: F.linear(x, x[0])), rand(8, 64))
    assert decision.decision == "unquantized"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), "addmm with beta or alpha"),
        (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), "addmm with beta or alpha"),
        (lambda m, x: torch.addmm(x, x, m.w), "addmm whose summand is no bias vector"),
    ],
)
def test_unusual_addmm(function: Function, expected: str) -> None:
    assert reason(Call(function, w=(64, 64), b=(64,)), rand(8, 64)) == expected


def test_unknown_tensor_subclass() -> None:
    module = nn.Linear(64, 64, bias=False)
    module.weight = nn.Parameter(TwoTensor(rand(64, 64), rand(64, 64)), requires_grad=False)
    (decision,) = decide(module, rand(8, 64))
    assert decision.reason == "weight is a TwoTensor"
    assert (decision.in_features, decision.out_features) == (64, 64)


def _set_row(m: nn.Module) -> None:
    m.w[0] = 1


@pytest.mark.parametrize(
    "write",
    [
        _set_row,
        lambda m: m.w.mul_(2),
        lambda m: torch.relu_(m.w),
        lambda m: F.relu(m.w, True),
        lambda m: torch.mul(m.w, 2, out=m.w),
        lambda m: m.w[0].zero_(),
        lambda m: m.w.t().mul_(2),
        lambda m: m.w.detach().mul_(2),
        lambda m: m.w.view(-1).mul_(2),
        lambda m: m.w.data.mul_(2),
    ],
    ids=["[]=", ".mul_", "relu_", "inplace", "out", "row", "transposed", "detach", "view", "data"],
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_weight_is_modified(write: Callable[[nn.Module], object], before: bool) -> None:
    """The constants are made before the graph runs, so they would miss the write."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        if before:
            write(m)
        y = F.linear(x, m.w)
        if not before:
            write(m)
        return y

    assert reason(Call(function, w=(64, 64)), rand(8, 64)) == "weight is modified in the graph"


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, out: torch.mm(x, m.w, out=out),
        lambda m, x, out: torch.mm(x, m.w.t(), out=out),
        lambda m, x, out: torch.matmul(x, m.w.T.contiguous(), out=out),
        lambda m, x, out: torch.addmm(m.b, x, m.w.t(), out=out),
    ],
)
def test_result_written_into_a_given_tensor(function: Function) -> None:
    """Nothing would be written into ``out``. The weight, however, is only read."""
    kept = reason(Call(function, w=(64, 64), b=(64,)), rand(8, 64), rand(8, 64))
    assert kept
    assert kept != "weight is modified in the graph"


def test_bias_may_be_modified() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        m.b.mul_(2)
        return F.linear(x, m.w, m.b)

    assert reason(Call(function, w=(64, 64), b=(64,)), rand(8, 64)) == ""


@pytest.mark.parametrize(
    ("model", "x", "options"),
    [
        (linear(), rand(8, 64), {"min_features": 128}),
        (linear(), rand(8, 64), {"min_m": 100, "small_m": "keep"}),
        (linear(64, 72), rand(8, 64), {}),
        (nn.Linear(64, 64), rand(8, 64).float(), {}),
        (Call(lambda m, x: F.linear(x, m.w * 2), w=(64, 64)), rand(8, 64), {}),
        (linear(), rand(8, 64), {}),
    ],
    ids=["narrow", "rows", "multiple", "float32", "computed", "fp8"],
)
def test_pattern_has_priority(model: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    (decision,) = decide(nn.ModuleDict({"proj": model})["proj"], x, ignored_layers=["re:.*"], **options)
    assert (decision.decision, decision.reason, decision.pattern) == ("unquantized", "ignored_layers: re:.*", "re:.*")


def test_first_pattern_that_matches_is_the_reason() -> None:
    module = nn.Sequential(linear(), linear(), linear())
    captured = capture(module, rand(8, 64))
    made = plan(captured, ignored_layers=["2", "re:[12]", "to_q", "1"])
    assert [d.pattern for d in made.decisions] == [None, "re:[12]", "2"]
    assert [d.decision for d in made.decisions] == ["quantized", "unquantized", "unquantized"]
    assert [d.path for d in made.quantized] == ["0"]
    assert made.unmatched_patterns == ("to_q", "1")
    assert made.patterns == ("2", "re:[12]", "to_q", "1")
    assert made.reasons() == {"ignored_layers: re:[12]": 1, "ignored_layers: 2": 1}


def test_plan_leaves_the_graph_as_it_is() -> None:
    captured = capture(nn.Sequential(linear(), nn.GELU(), linear(64, 72)), rand(8, 64))
    text, metas = str(captured.graph), [dict(n.meta) for n in captured.graph.nodes]
    made = plan(captured)
    assert len(made.decisions) == 2
    assert str(captured.graph) == text
    assert [n.meta for n in captured.graph.nodes] == metas


def test_decisions_name_nodes_of_the_graph() -> None:
    captured = capture(nn.Sequential(linear(), nn.GELU(), linear()), rand(8, 64))
    names = {node.name: node for node in captured.graph.nodes}
    for decision in plan(captured).decisions:
        assert names[decision.node].target is F.linear
        assert decision.weight is not None
        assert names[decision.weight].op == "placeholder"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x) * self.to_k(x)


def with_lora(model: nn.Module, **config: Any) -> nn.Module:
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=16, target_modules=["to_q"], init_lora_weights=False, **config), model
    )
    return adapted.to(torch.bfloat16).requires_grad_(False)


def test_lora_adapters_are_kept_and_not_tracked() -> None:
    decisions = decide(with_lora(Attention()), rand(8, 64))
    assert [(d.path, d.decision, d.reason, d.tracked) for d in decisions] == [
        ("to_q", "quantized", "", True),
        ("to_q.lora_A.default", "unquantized", "low-rank adapter", False),
        ("to_q.lora_B.default", "unquantized", "low-rank adapter", False),
        ("to_k", "quantized", "", True),
    ]
    assert [d.weight is not None for d in decisions] == [True] * 4


@pytest.mark.parametrize("pattern", ["to_q", "re:^to_q$", "to_?", "attn.to_q", "to_qkv"])
def test_pattern_reaches_a_layer_wrapped_by_lora(pattern: str) -> None:
    model = nn.Sequential()
    model.add_module("attn", with_lora(Attention()))
    decisions = decide(model, rand(8, 64), ignored_layers=["re:attn.to_q$"] if pattern.startswith("re:") else [pattern])
    base, lora_a, lora_b, _ = decisions
    assert (base.path, base.decision) == ("attn.to_q", "unquantized")
    assert base.reason == f"ignored_layers: {base.pattern}"
    assert [(d.reason, d.pattern) for d in (lora_a, lora_b)] == [("low-rank adapter", None)] * 2


def test_dynamic_rows_count_as_those_seen() -> None:
    assert reason(linear(), rand(2, 8, 64), dynamic=True, min_m=16) == ""
    assert reason(linear(), rand(2, 8, 64), dynamic=True, min_m=17, small_m="keep") == "M is below min_m 17"


def test_rows_known_only_at_run_time() -> None:
    """The meta function of ``_scaled_mm`` compares their number, so no graph with them could be traced."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        selected = Call(lambda m, x, mask: F.linear(x[mask], m.w), w=(64, 64))
        kept = reason(selected, rand(8, 64), torch.arange(8) > 3, min_m=1)
    assert kept == "number of rows is known only at run time"


@pytest.mark.parametrize("weight", ["parameter", "activation"])
def test_deciding_makes_no_shape_static(weight: str) -> None:
    """One graph serves several resolutions: rows above and below ``min_m``, and any size of a computed weight."""
    function = (lambda m, x: F.linear(x, m.w)) if weight == "parameter" else (lambda m, x: F.linear(x, x))
    module = Call(function, w=(64, 64))
    compiles = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiles.append(gm)
        return gm.forward

    options = {"inner_backend": inner, "min_features": 1, "min_m": 8}
    compiled = torch.compile(module, backend="fp8_diffusion", fullgraph=True, dynamic=True, options=options)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert compiled(rand(12, 64)).shape[0] == 12
        assert compiled(rand(5, 64)).shape[0] == 5
    assert len(compiles) == 1


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside = linear(), linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return torch.cond(x.sum() > 0, lambda x: self.inside(x), lambda x: self.inside(x) * 2, (x,))


def test_linears_inside_a_higher_order_operator_are_reported() -> None:
    before, *inside = decide(Branches(), rand(8, 64))
    assert (before.path, before.decision) == ("before", "quantized")
    assert [(d.path, d.in_features, d.out_features, d.weight) for d in inside] == [("inside", 64, 32, None)] * 2
    assert {d.reason for d in inside} == {"inside a higher-order operator"}
    assert len({d.node for d in inside}) == 2


def test_linears_inside_a_checkpoint_are_reported() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(linear(), nn.GELU(), linear())

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    decisions = decide(Checkpointed(), rand(8, 64))
    assert [d.path for d in decisions] == ["block.0", "block.2"]
    assert {(d.decision, d.reason) for d in decisions} == {("unquantized", "inside a higher-order operator")}


def test_pattern_that_matches_only_inside_a_higher_order_operator_is_matched() -> None:
    made = plan(capture(Branches(), rand(8, 64)), ignored_layers=["inside"])
    assert made.unmatched_patterns == ()
    assert {d.reason for d in made.decisions if d.path == "inside"} == {"ignored_layers: inside"}


def test_vector_as_weight_inside_a_higher_order_operator() -> None:
    module = Call(lambda m, x: torch.cond(x.sum() > 0, lambda x: F.linear(x, m.w), lambda x: x.sum(-1), (x,)), w=(64,))
    assert [d.decision for d in decide(module, rand(8, 64))] == ["unquantized"]


# A matrix of fewer than 32 rows is a batch of vectors.
@pytest.mark.parametrize(
    ("shape", "few"),
    [
        ((1, 64), True),
        ((31, 64), True),
        ((32, 64), False),
        ((2, 7, 64), True),
        ((2, 8, 64), False),
        ((32, 1, 64), False),
    ],
)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_small_m_with_the_weight_alone_in_fp8(shape: tuple[int, ...], few: bool, granularity: str) -> None:
    (decision,) = decide(linear(), rand(*shape), min_m=8, granularity=granularity)
    usual = {"row": ROWWISE, "tensor": TENSORWISE}[granularity]
    assert decision.call == (WEIGHT_ONLY if few else usual)
    assert (decision.decision, decision.reason) == ("quantized", "")


def test_small_m_refuse_what_many_do() -> None:
    """At load time, before the number of rows is known, both must be decided alike."""
    assert reason(linear(72, 48), rand(1, 72), min_m=8) == "in_features 72 is not a multiple of 16"


def refused(*calls: How) -> list[Decision]:
    """The decisions on a device that refuses ``calls``."""
    asked: list[Any] = []

    def refusal(scheme: Fp8, call: How, *what: Any) -> str | None:
        asked.append((scheme, *what))
        return f"no {call.name}" if call in calls else None

    found = list(plan(capture(linear(64, 32), rand(2, 8, 64)), refusal).decisions)
    assert set(asked) == {(Fp8(min_m=1), torch.device("cpu"), 16, (64, 32), torch.bfloat16, True, None)}
    return found


def test_a_refused_shape_has_its_scales_applied_afterwards() -> None:
    (decision,) = refused(ROWWISE)
    assert (decision.decision, decision.call) == ("quantized", ROWWISE_UNFUSED_SCALES)


def test_a_shape_refused_altogether_is_kept() -> None:
    (decision,) = refused(ROWWISE, ROWWISE_UNFUSED_SCALES)
    assert (decision.decision, decision.call, decision.reason) == ("unquantized", None, "no fp8-row-unfused-scales")


def test_where_no_kernel_takes_blocks_the_weight_is_dequantized_and_the_reason_said() -> None:
    def refusal(scheme: Fp8, call: How, *what: Any) -> str | None:
        return "only on SM90" if call in BLOCKS.values() else None

    captured = capture(linear(64, 32), rand(2, 8, 64))
    (decision,) = plan(captured, refusal, weight_block_size=[128, 128]).decisions
    assert (decision.decision, decision.call) == ("quantized", DEQUANTIZED_BLOCKS)
    assert decision.reason == "only on SM90"


def test_an_ignored_layer_is_not_tried_on_the_device() -> None:
    def refusal(*what: Any) -> str | None:
        raise AssertionError(what)

    (decision,) = plan(capture(linear(64, 32), rand(2, 8, 64)), refusal, ignored_layers=["*"]).decisions
    assert decision.reason == "ignored_layers: *"
