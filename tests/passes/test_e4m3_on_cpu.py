from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, Node

import fp8_compile
from fp8_compile.numerics import FP8_DTYPE, decoded_e4m3, rounded_to_e4m3
from fp8_compile.passes.e4m3_on_cpu import e4m3_on_cpu
from tests.support.aten import Aten, aten, prims
from tests.support.graphs import CONTEXT, rand, show

CAST = prims.convert_element_type.default
F32 = torch.float32


@pytest.fixture(autouse=True)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever CPU this is, graphs are rewritten as for one with AVX512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: getattr(request, "param", "AVX512"))


def readers(build: Aten, count: int, onward: torch.dtype | None) -> Graph:
    """Linears that read one rounded activation in float32, or in another dtype."""
    quantized = build.quantize(build.input("x", 2, 8, 64, dtype=F32))
    results = []
    for name in "qkv"[:count]:
        values = build.call(CAST, build.call(aten.reshape.default, quantized, [16, 64]), F32)
        if onward is not None:
            values = build.call(CAST, values, onward)
        weight = build.input(f"{name}_weight", 64, 32, dtype=F32 if onward is None else onward)
        results.append(build.call(aten.mm.default, values, weight))
    return build.output(*results)


def test_two_readers_in_bfloat16_share_one_rounding_and_one_cast() -> None:
    graph = readers(Aten("cpu"), 2, torch.bfloat16)
    assert e4m3_on_cpu(graph, CONTEXT) == 1
    graph.lint()
    assert_expected_inline(
        show(graph),
        """\
x: float32[2, 8, 64]
q_weight: bfloat16[64, 32]
k_weight: bfloat16[64, 32]
clamp_min = clamp_min.default(x, -448.0)
clamp_max = clamp_max.default(clamp_min, 448.0)
mul = mul.Tensor(clamp_max, 1048577.0)
sub = sub.Tensor(mul, clamp_max)
sub_1 = sub.Tensor(mul, sub)
add = add.Tensor(clamp_max, 24576.0)
sub_2 = sub.Tensor(add, 24576.0)
abs_1 = abs.default(clamp_max)
lt = lt.Scalar(abs_1, 0.015625)
where = where.self(lt, sub_2, sub_1)
convert_element_type_default_5 = convert_element_type.default(where, torch.bfloat16)
reshape_default = reshape.default(convert_element_type_default_5, (16, 64))
mm_default = mm.default(reshape_default, q_weight)
reshape_default_1 = reshape.default(convert_element_type_default_5, (16, 64))
mm_default_1 = mm.default(reshape_default_1, k_weight)
return (mm_default, mm_default_1)""",
    )
    assert all("val" in node.meta for node in graph.nodes if node.op != "output")
    dtypes = {node.meta["val"].dtype for node in graph.find_nodes(op="call_function", target=aten.reshape.default)}
    assert dtypes == {torch.bfloat16}
    assert e4m3_on_cpu(graph, CONTEXT) == 0


def test_readers_in_float32() -> None:
    graph = readers(Aten("cpu"), 3, None)
    assert e4m3_on_cpu(graph, CONTEXT) == 1
    assert not graph.find_nodes(op="call_function", target=CAST)
    (rounded,) = graph.find_nodes(op="call_function", target=aten.where.self)
    assert [user.target for user in rounded.users] == [aten.reshape.default] * 3


@pytest.mark.parametrize("capability", ["AVX2"], indirect=True)
def test_with_avx2_a_weight_is_decoded_by_integer_operators() -> None:
    build = Aten("cpu")
    graph = build.output(build.call(CAST, build.input("w", 4, 8, dtype=FP8_DTYPE), F32))
    assert e4m3_on_cpu(graph, CONTEXT) == 1
    assert_expected_inline(
        show(graph),
        """\
w: float8_e4m3fn[4, 8]
view = view.dtype(w, torch.int8)
alias = alias.default(view)
convert_element_type = convert_element_type.default(alias, torch.int32)
lshift = __lshift__.Scalar(convert_element_type, 20)
bitwise_and = bitwise_and.Scalar(lshift, -2014314496)
view_1 = view.dtype(bitwise_and, torch.float32)
alias_1 = alias.default(view_1)
mul = mul.Tensor(alias_1, 1.329227995784916e+36)
bitwise_and_1 = bitwise_and.Scalar(convert_element_type, 127)
eq = eq.Scalar(bitwise_and_1, 127)
scalar_tensor = scalar_tensor.default(nan, dtype=torch.float32, layout=torch.strided, device=cpu)
where = where.self(eq, scalar_tensor, mul)
convert_element_type_1 = convert_element_type.default(where, torch.bfloat16)
convert_element_type_2 = convert_element_type.default(convert_element_type_1, torch.float32)
return (convert_element_type_2,)""",
    )
    assert e4m3_on_cpu(graph, CONTEXT) == 0


def _weight(build: Aten) -> Node:
    return build.call(CAST, build.input("w", 4, 8, dtype=FP8_DTYPE), F32)


def _stored(build: Aten) -> Node:
    return build.quantize(build.input("x", 4, 8, dtype=F32))


def _read_by_another_operator(build: Aten) -> Node:
    quantized = build.quantize(build.input("x", 4, 8, dtype=F32))
    return build.call(aten.add.Tensor, build.call(CAST, quantized, F32), build.call(CAST, quantized, torch.bfloat16))


def _of_bfloat16(build: Aten) -> Node:
    return build.call(CAST, build.quantize(build.input("x", 4, 8)), F32)


UNCHANGED: dict[str, Callable[[Aten], Node]] = {
    "a weight, with AVX512": _weight,
    "stored as FP8": _stored,
    "also read in another dtype": _read_by_another_operator,
    "cast from bfloat16": _of_bfloat16,
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_unchanged(name: str) -> None:
    build = Aten("cpu")
    graph = build.output(UNCHANGED[name](build))
    text = str(graph)
    assert e4m3_on_cpu(graph, CONTEXT) == 0
    assert str(graph) == text


def test_nothing_changes_on_a_gpu() -> None:
    graph = readers(Aten("cuda"), 2, torch.bfloat16)
    assert e4m3_on_cpu(graph, CONTEXT) == 0


@pytest.mark.parametrize(
    "setting", [{"cpp.enable_unsafe_math_opt_flag": True}, {"cpp.enable_floating_point_contract_flag": "fast"}]
)
def test_nothing_changes_where_a_compiler_may_compute_otherwise(setting: dict[str, Any]) -> None:
    with config.patch(setting):
        assert e4m3_on_cpu(readers(Aten("cpu"), 2, None), CONTEXT) == 0


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.mod = (nn.Linear(256, 256) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = x * self.mod(t)[:, None]
        return self.q(x), self.k(x)


@pytest.mark.inductor
@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}], ids=["row", "tensor"])
def test_generated_code_is_the_same_to_the_bit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # by the instructions that this CPU has
    m, inputs = TwoReaders().bfloat16(), (rand(2, 64, 256), rand(2, 256))

    def run(**more: Any) -> tuple[Any, str, int | None]:
        torch._dynamo.reset()
        with torch.no_grad(), config.patch(force_disable_caches=True):
            compiled = torch.compile(m, backend="fp8_diffusion", options={**options, **more})
            out, (code,) = run_and_get_code(compiled, *inputs)
        (results,) = fp8_compile.report(m).passes.values()
        return out, code, next(one.matches for one in results if one.name == "e4m3_on_cpu")

    out, code, matches = run()
    expected, plain, none = run(disabled_passes=["e4m3_on_cpu"])
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert "convert<at::Float8_e4m3fn" in plain
    assert "convert<at::Float8_e4m3fn" not in code
    assert (bool(matches), none) == (True, None)


@pytest.mark.inductor
def test_compiled_they_are_torchs_casts_to_the_bit() -> None:
    """Each bfloat16, each tie and its neighbours, each code; by the C++ that Inductor writes."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    ties = (torch.arange(1 << 8) << 19).view(-1, 1) | (torch.arange(118, 136) << 23).view(1, -1)
    near = torch.stack([ties - 1, ties, ties + 1]).to(torch.int32).view(F32).flatten()
    values = torch.cat([every, near, -near])
    codes = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE)
    with config.patch(force_disable_caches=True):
        rounded = torch.compile(rounded_to_e4m3)(values)
        decoded = torch.compile(decoded_e4m3)(codes)
    torch.testing.assert_close(rounded, values.clamp(-448, 448).to(FP8_DTYPE).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(decoded, codes.float(), rtol=0, atol=0, equal_nan=True)
