"""The matrices of experts, multiplied by ``grouped_mm``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from fp8_compile.numerics import quantize_rowwise
from fp8_compile.schemes.fp8 import Fp8
from tests.support.graphs import Call, Captured, capture, plan, rand, rewritten, run, show
from tests.support.sqnr import sqnr

EXPERTS, K, N = 3, 64, 32
OFFS = torch.tensor([5, 5, 24], dtype=torch.int32)


def swiglu(m: nn.Module, x: Tensor, offs: Tensor) -> Tensor:
    gate, up = F.grouped_mm(x, m.gate_up_proj, offs=offs).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, m.down_proj, offs=offs)


def captured_swiglu() -> Captured:
    module = Call(swiglu, gate_up_proj=(EXPERTS, K, 2 * N), down_proj=(EXPERTS, N, K))
    return capture(module, rand(24, K), OFFS)


def test_the_matrices_of_experts() -> None:
    captured = captured_swiglu()
    assert_expected_inline(
        show(captured.graph),
        """\
self.gate_up_proj: bfloat16[3, 64, 64]
x: bfloat16[24, 64]
more.0: int32[3]
self.down_proj: bfloat16[3, 32, 64]
_grouped_mm = _grouped_mm(x, self.gate_up_proj, offs=more.0, bias=None, out_dtype=None)
chunk = .chunk(_grouped_mm, 2, dim=-1)
gate = getitem(chunk, 0)
up = getitem(chunk, 1)
silu = silu(gate)
mul = mul(silu, up)
_grouped_mm_1 = _grouped_mm(mul, self.down_proj, offs=more.0, bias=None, out_dtype=None)
return (_grouped_mm_1,)""",
    )
    gm, constants = rewritten(captured)
    assert_expected_inline(
        show(gm.graph),
        """\
x: bfloat16[24, 64]
more.0: int32[3]
gate_up_proj: float8_e4m3fn[3, 64, 64]
gate_up_proj_scale: float32[3, 64, 1]
down_proj: float8_e4m3fn[3, 64, 32]
down_proj_scale: float32[3, 64, 1]
quantize_rowwise = quantize_rowwise(x)
grouped_linear = grouped_linear(quantize_rowwise, gate_up_proj, gate_up_proj_scale, more.0, torch.bfloat16)
chunk = .chunk(grouped_linear, 2, dim=-1)
gate = getitem(chunk, 0)
up = getitem(chunk, 1)
silu = silu(gate)
mul = mul(silu, up)
quantize_rowwise_1 = quantize_rowwise(mul)
grouped_linear_1 = grouped_linear(quantize_rowwise_1, down_proj, down_proj_scale, more.0, torch.bfloat16)
return (grouped_linear_1,)""",
    )
    assert [(c.scheme, c.transposed) for c in constants] == [(Fp8(min_m=1), True)] * 2
    with torch.no_grad():
        expected = captured.gm.forward(*captured.inputs)[0]
    (out,) = run(captured, gm, constants)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert sqnr(expected, out) > 23


def test_each_token_is_multiplied_by_the_matrix_of_its_expert() -> None:
    """The same as a linear for each expert, to a rounding."""
    module = Call(grouped, w=(EXPERTS, K, N))
    captured = capture(module, x := rand(24, K), OFFS)
    gm, constants = rewritten(captured)
    (out,) = run(captured, gm, constants)
    values, scale = quantize_rowwise(x)
    start = 0
    for end, w in zip(OFFS.tolist(), module.w, strict=True):
        qdata, w_scale = Fp8().quantize_weight(w.t().contiguous())
        expected = (values[start:end].float() @ qdata.float().t()) * scale[start:end] * w_scale.t()
        torch.testing.assert_close(out[start:end].float(), expected, rtol=2**-7, atol=0)
        start = end


def test_matrices_stored_output_features_first() -> None:
    """As transformers stores them, with a transposition before each product."""
    ways = {
        "transpose": lambda w: w.transpose(-2, -1),
        "mT": lambda w: w.mT,
        "permute": lambda w: w.permute(0, 2, 1),
    }
    stored = rand(EXPERTS, N, K)
    for way in ways.values():
        captured = capture(
            Call(lambda m, x, offs, way=way: F.grouped_mm(x, way(m.w), offs=offs), w=stored.shape), rand(24, K), OFFS
        )
        gm, (constants,) = rewritten(captured)
        assert not constants.transposed
        (out,) = run(captured, gm, [constants])
        with torch.no_grad():
            assert sqnr(captured.gm.forward(*captured.inputs)[0], out) > 26


def test_other_dimensions_exchanged_are_no_weight() -> None:
    captured = capture(
        Call(lambda m, x, offs: F.grouped_mm(x, m.w.transpose(0, 1).contiguous(), offs=offs), w=(K, EXPERTS, N)),
        rand(24, K),
        OFFS,
    )
    (decision,) = plan(captured).decisions
    assert decision.reason == "weight is computed at each call, so it cannot be quantized once"


def grouped(m: nn.Module, x: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, m.w, offs=offs)


REFUSED: dict[str, tuple[Any, tuple[int, ...], dict[str, Any], str]] = {
    "3-D by 3-D, without offsets": (
        lambda m, x, offs: F.grouped_mm(x.view(EXPERTS, 8, K), m.w),
        (EXPERTS, K, N),
        {},
        "grouped_mm of 3 and 3 dimensions, not 2 and 3",
    ),
    "2-D by 2-D": (
        lambda m, x, offs: F.grouped_mm(x.t(), m.w, offs=offs),
        (24, N),
        {},
        "grouped_mm of 2 and 2 dimensions, not 2 and 3",
    ),
    "a weight that is no parameter": (
        lambda m, x, offs: F.grouped_mm(x, m.w * 2, offs=offs),
        (EXPERTS, K, N),
        {},
        "weight is computed at each call, so it cannot be quantized once",
    ),
    "tensor": (
        grouped,
        (EXPERTS, K, N),
        {"granularity": "tensor"},
        "experts: with a scale per row and dynamic activations only, not fp8-tensor",
    ),
    "blocks": (
        grouped,
        (EXPERTS, K, N),
        {"weight_block_size": [128, 128]},
        "experts: with a scale per row and dynamic activations only, not fp8-128x128",
    ),
    "static": (
        grouped,
        (EXPERTS, K, N),
        {"activation_scheme": "static"},
        "experts: with a scale per row and dynamic activations only, not fp8-row-static",
    ),
    "int8": (
        grouped,
        (EXPERTS, K, N),
        {"method": "int8"},
        "experts: not with method 'int8'",
    ),
    "features": (
        grouped,
        (EXPERTS, K, 24),
        {},
        "out_features 24 is not a multiple of 16",
    ),
    "narrow": (
        grouped,
        (EXPERTS, K, N),
        {"min_features": 64},
        "narrower than min_features 64",
    ),
    "written into": (
        lambda m, x, offs: (m.w.mul_(2), F.grouped_mm(x, m.w, offs=offs)),
        (EXPERTS, K, N),
        {},
        "weight is modified in the graph",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    function, shape, options, reason = REFUSED[case]
    captured = capture(Call(function, w=shape), rand(24, K), OFFS)
    (decision,) = plan(captured, **options).decisions
    assert (decision.decision, decision.reason) == ("unquantized", reason)
    gm, constants = rewritten(captured, **options)
    assert not constants
    assert show(gm.graph) == show(captured.graph)


def test_a_bias_is_refused() -> None:
    """No version of torch computes one yet, so there is no graph of Dynamo's that has it."""
    captured = captured_swiglu()
    (first, *_) = captured.graph.find_nodes(op="call_function", target=torch._grouped_mm)
    first.kwargs = {**first.kwargs, "bias": captured.graph.find_nodes(op="placeholder")[0]}
    assert plan(captured).decisions[0].reason == "grouped_mm with a bias"


def test_activations_as_they_are() -> None:
    captured = captured_swiglu()
    gm, constants = rewritten(captured, activation_scheme="none")
    assert [node.target.__name__ for node in gm.graph.nodes if "grouped" in str(node.target)] == [
        "grouped_dequantized"
    ] * 2
    with torch.no_grad():
        expected = captured.gm.forward(*captured.inputs)[0]
    assert sqnr(expected, run(captured, gm, constants)[0]) > 26


def test_the_device_is_asked_with_the_number_of_experts() -> None:
    asked: list[Any] = []

    def refusal(*given: Any) -> str:
        asked.append(given[2:])
        return "no kernel"

    decisions = plan(captured_swiglu(), refusal).decisions
    assert [d.reason for d in decisions] == ["no kernel"] * 2
    cpu = torch.device("cpu")
    assert asked == [
        (cpu, 24, (K, 2 * N), torch.bfloat16, False, EXPERTS),
        (cpu, 24, (N, K), torch.bfloat16, False, EXPERTS),
    ]
