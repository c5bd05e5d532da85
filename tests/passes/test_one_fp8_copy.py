from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.graph import GraphLowering
from torch.fx import Graph, Node

from fp8_compile import numerics
from fp8_compile.block_scales import MATMUL
from fp8_compile.inductor import inner
from fp8_compile.inductor.inner import PostGradPasses
from fp8_compile.numerics import FP8_DTYPE
from fp8_compile.passes import pipeline
from fp8_compile.passes.context import Context
from fp8_compile.passes.one_fp8_copy import one_fp8_copy
from tests.support.aten import Aten, aten, prims
from tests.support.graphs import CONTEXT, rand, show
from tests.support.sqnr import sqnr


def matmuls(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="call_function", target=aten._scaled_mm.default))


def asked(graph: Graph) -> list[list[bool]]:
    """For each matmul, which of its operands it asks the eager strides of."""
    return [[v is not None for v in node.meta["eager_input_vals"][0][:4]] for node in matmuls(graph)]


def qkv(readers: int = 3) -> Graph:
    build = Aten()
    quantized = build.quantize(build.input("x", 2, 8, 64))
    results = [build.matmul(build.call(aten.reshape.default, quantized, [16, 64]), name) for name in "qkv"[:readers]]
    return build.output(*results)


def test_one_quantized_activation_for_three_matmuls() -> None:
    graph = qkv()
    assert asked(graph) == [[True] * 4] * 3
    assert one_fp8_copy(graph, CONTEXT) == 3
    graph.lint()
    text = "\n".join(re.sub(r"(_scaled_mm.default\(\w+), .*", r"\1, ...)", line) for line in show(graph).splitlines())
    text = "\n".join(line for line in text.splitlines() if " = " in line and not line.startswith("permute"))
    assert_expected_inline(
        text,
        """\
convert_element_type_default = convert_element_type.default(x, torch.float8_e4m3fn)
inductor_force_stride_order_default = inductor_force_stride_order.default(convert_element_type_default, (3, 2, 1))
reshape_default = reshape.default(inductor_force_stride_order_default, (16, 64))
_scaled_mm_default = _scaled_mm.default(reshape_default, ...)
reshape_default_1 = reshape.default(inductor_force_stride_order_default, (16, 64))
_scaled_mm_default_1 = _scaled_mm.default(reshape_default_1, ...)
reshape_default_2 = reshape.default(inductor_force_stride_order_default, (16, 64))
_scaled_mm_default_2 = _scaled_mm.default(reshape_default_2, ...)""",
    )
    assert asked(graph) == [[False, True, True, True]] * 3


def test_with_blocks_the_scales_of_the_activation_are_written_once_too() -> None:
    build = Aten()
    x = build.input("x", 16, 256)
    values = build.quantize(x)
    scales = build.call(aten.clone.default, build.input("amax", 2, 16, dtype=torch.float32))
    results = []
    for name in "qk":
        weight = build.input(f"{name}_weight", 32, 256, dtype=FP8_DTYPE)
        operands = values, scales, weight, build.input(f"{name}_scale", 1, 4, dtype=torch.float32), 128, torch.float32
        node = build.call(MATMUL, *operands, val=build.empty(16, 32))
        node.meta["eager_input_vals"] = torch.fx.map_arg(operands, lambda n: n.meta["val"]), {}
        results.append(node)
    graph = build.output(*results)
    assert one_fp8_copy(graph, CONTEXT) == 2
    for node in results:
        assert [v is not None for v in node.meta["eager_input_vals"][0]] == [False, False, True, True, True, True]
    forced = graph.find_nodes(op="call_function", target=prims.inductor_force_stride_order.default)
    assert {node.args[0] for node in forced} == {values, scales}
    assert {operand for node in results for operand in node.args[:2]} == set(forced)
    assert one_fp8_copy(graph, CONTEXT) == 0


def test_only_the_request_for_the_first_operand_goes() -> None:
    graph = qkv(1)
    (node,) = matmuls(graph)
    args, kwargs = node.meta["eager_input_vals"]
    meta = dict(node.meta)
    one_fp8_copy(graph, CONTEXT)
    after_args, after_kwargs = node.meta["eager_input_vals"]
    assert after_args[0] is None
    assert len(after_args) == len(args)
    assert all(new is old for new, old in zip(after_args[1:], args[1:], strict=True))
    assert after_kwargs is kwargs
    assert {**node.meta, "eager_input_vals": 0} == {**meta, "eager_input_vals": 0}


def test_forced_layout_is_the_row_major_one() -> None:
    graph = qkv()
    one_fp8_copy(graph, CONTEXT)
    (forced,) = graph.find_nodes(op="call_function", target=prims.inductor_force_stride_order.default)
    source, strides = forced.args
    assert source.meta["val"].stride() == forced.meta["val"].stride() == (512, 64, 1)
    assert sorted(range(3), key=lambda d: strides[d]) == sorted(range(3), key=lambda d: forced.meta["val"].stride(d))


def test_second_time_changes_nothing() -> None:
    graph = qkv()
    one_fp8_copy(graph, CONTEXT)
    text = str(graph)
    assert one_fp8_copy(graph, CONTEXT) == 0
    assert str(graph) == text


def test_each_activation_is_fixed_once() -> None:
    build = Aten()
    a, b = (build.quantize(build.input(name, 16, 64)) for name in "xy")
    graph = build.output(*(build.matmul(q, f"w{i}") for i, q in enumerate((a, b, a, b, a))))
    assert one_fp8_copy(graph, CONTEXT) == 5
    assert len(graph.find_nodes(op="call_function", target=prims.inductor_force_stride_order.default)) == 2
    assert len({node.args[0] for node in matmuls(graph)}) == 2


def test_views_are_passed_over() -> None:
    build = Aten()
    quantized = build.quantize(build.input("x", 2, 2, 4, 64))
    once = build.call(aten.view.default, quantized, [4, 4, 64])
    graph = build.output(build.matmul(build.call(aten._unsafe_view.default, once, [16, 64]), "w"), quantized)
    assert one_fp8_copy(graph, CONTEXT) == 1
    (forced,) = graph.find_nodes(op="call_function", target=prims.inductor_force_stride_order.default)
    assert forced.args[0] is quantized
    assert once.args[0] is forced
    assert list(quantized.users) == [forced]


def _no_request(build: Aten) -> Sequence[Node]:
    node = build.matmul(build.quantize(build.input("x", 16, 64)), "w")
    del node.meta["eager_input_vals"]
    return (node,)


def _none_already(build: Aten) -> Sequence[Node]:
    node = build.matmul(build.quantize(build.input("x", 16, 64)), "w")
    args, kwargs = node.meta["eager_input_vals"]
    node.meta["eager_input_vals"] = (None, *args[1:]), kwargs
    return (node,)


def _not_contiguous(build: Aten) -> Sequence[Node]:
    quantized = build.quantize(build.input("x", 64, 16))
    return (build.matmul(build.call(aten.permute.default, quantized, [1, 0]), "w"),)


def _view_of_not_contiguous(build: Aten) -> Sequence[Node]:
    quantized = build.quantize(build.call(aten.permute.default, build.input("x", 2, 64, 8), [0, 2, 1]))
    return (build.matmul(build.call(aten.reshape.default, quantized, [16, 64]), "w"),)


def _other_operator(build: Aten) -> Sequence[Node]:
    x = build.input("x", 16, 64)
    node = build.call(aten.mm.default, build.call(aten.view.default, x, [16, 64]), build.input("w", 64, 32))
    node.meta["eager_input_vals"] = tuple(torch.fx.map_arg(node.args, lambda n: n.meta["val"])), {}
    return (node,)


@pytest.mark.parametrize(
    "write", [_no_request, _none_already, _not_contiguous, _view_of_not_contiguous, _other_operator]
)
def test_unchanged(write: Callable[[Aten], Sequence[Node]]) -> None:
    build = Aten()
    graph = build.output(*write(build))
    text, requests = str(graph), [node.meta.get("eager_input_vals") for node in graph.nodes]
    assert one_fp8_copy(graph, CONTEXT) == 0
    assert str(graph) == text
    assert all(n.meta.get("eager_input_vals") is r for n, r in zip(graph.nodes, requests, strict=True))


def test_input_of_the_graph_has_a_layout_already() -> None:
    build = Aten()
    graph = build.output(build.matmul(build.input("q", 16, 64, dtype=FP8_DTYPE), "w"))
    text = str(graph)
    assert one_fp8_copy(graph, CONTEXT) == 1
    assert str(graph) == text
    assert asked(graph) == [[False, True, True, True]]


class QKV(nn.Module):
    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prepare = prepare
        self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.prepare(x)
        return self.to_q(x), self.to_k(x), self.to_v(x)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is for graphs with scaled matmuls, which are not worth their time on a CPU."""
    monkeypatch.setattr(numerics, "has_kernel", lambda device_type: True)


GRANULARITIES = [
    pytest.param("row", marks=pytest.mark.skipif(torch.__version__ < (2, 12), reason="no row-wise CPU kernel")),
    "tensor",
]


def options(granularity: str, passes: Any) -> dict[str, Any]:
    return {
        "granularity": granularity,
        "min_features": 64,
        "post_grad_custom_post_pass": passes,
        "cpp.vec_isa_ok": False,  # else Inductor tries each instruction set of this CPU for seconds
    }


PREPARATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "normalized": (lambda x: F.layer_norm(x, (64,)), (2, 8, 64)),
    "transposed view": (lambda x: x.transpose(1, 2), (2, 64, 8)),
}


class Stopped(Exception):
    pass


def stop_with(found: list[Any]) -> Callable[[Any], None]:
    """A step of a compilation that keeps what it is given and ends the compilation."""

    def step(value: Any) -> None:
        found.append(value)
        raise Stopped("as the test wants")

    return step


def compile_until_stopped(model: nn.Module, x: Tensor, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), config.patch(force_disable_caches=True), pytest.raises(Exception, match="as the test wants"):
        torch.compile(model, backend="fp8_diffusion", options=options)(x)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_graph_of_inductor(granularity: str) -> None:
    """On the graph that reaches the pass in a real compilation; nothing of it is generated or run."""
    graphs: list[Graph] = []
    prepare, shape = PREPARATIONS["normalized"]
    compile_until_stopped(QKV(prepare).bfloat16(), rand(*shape), options(granularity, stop_with(graphs)))
    (graph,) = graphs
    others = [n for n in graph.nodes if n not in matmuls(graph)]
    requests = [n.meta.get("eager_input_vals") for n in others]
    assert asked(graph) == [[True] * 4] * 3
    assert one_fp8_copy(graph, CONTEXT) == 3
    graph.lint()
    (forced,) = graph.find_nodes(op="call_function", target=prims.inductor_force_stride_order.default)
    assert forced.args[0].meta["val"].dtype == FP8_DTYPE
    assert all(n.meta.get("eager_input_vals") is r for n, r in zip(others, requests, strict=True))
    text = str(graph)
    assert one_fp8_copy(graph, CONTEXT) == 0
    assert str(graph) == text


@pytest.mark.inductor
@pytest.mark.parametrize("preparation", PREPARATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_generated_code(granularity: str, preparation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three FP8 tensors are written without the pass, one with it, and that one row-major."""
    prepare, shape = PREPARATIONS[preparation]
    model, x = QKV(prepare).bfloat16(), rand(*shape)

    def buffers() -> list[str]:
        sources: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(GraphLowering, "save_output_code", stop_with(sources))
            compile_until_stopped(model, x, options(granularity, None))
        return re.findall(r"= empty_strided_cpu\((\(.*?\), \(.*?\)), torch.float8_e4m3fn\)", sources[0])

    assert buffers() == ["(2, 8, 64), (512, 64, 1)"]
    monkeypatch.setattr(pipeline, "PASSES", [one for one in pipeline.PASSES if one.stage == "dynamo"])
    assert buffers() == ["(16, 64), (64, 1)"] * 3


@pytest.mark.inductor
def test_result_of_the_generated_code() -> None:
    """The only test here that runs what Inductor generates: an activation in the wrong layout would raise."""
    prepare, shape = PREPARATIONS["transposed view"]
    model, x = QKV(prepare).bfloat16(), rand(*shape)
    compiled = torch.compile(model, backend="fp8_diffusion", options=options("tensor", None))
    with torch.no_grad():
        for value, expected in zip(compiled(x), model(x), strict=True):
            assert sqnr(expected, value) > 25


class Named(CustomGraphPass):
    def __init__(self, name: str | None, log: list[str | None] | None = None) -> None:
        self.name, self.log = name, log

    def __call__(self, graph: Graph) -> None:
        assert self.log is not None
        self.log.append(self.name)

    def uuid(self) -> str | None:
        return self.name


def test_uuid_is_the_same_for_the_same_passes() -> None:
    assert PostGradPasses(None, CONTEXT).uuid() == PostGradPasses(None, CONTEXT).uuid() is not None
    assert PostGradPasses(Named("a"), CONTEXT).uuid() == PostGradPasses([Named("a")], CONTEXT).uuid()


def test_uuid_tells_passes_apart() -> None:
    user_passes = [None, Named("a"), Named("b"), [Named("a"), Named("b")], (Named("b"), Named("a"))]
    assert len({PostGradPasses(passes, CONTEXT).uuid() for passes in user_passes}) == len(user_passes)


def test_uuid_changes_with_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = PostGradPasses(Named("a"), CONTEXT).uuid()
    monkeypatch.setattr(inner, "source_hash", lambda: "other")
    assert PostGradPasses(Named("a"), CONTEXT).uuid() != before


@pytest.mark.parametrize("passes", [Named(None), lambda graph: None, [Named("a"), Named(None)], [print]])
def test_no_uuid_with_a_pass_that_has_none(passes: Any) -> None:
    assert PostGradPasses(passes, CONTEXT).uuid() is None


def test_user_passes_run_first(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str | None] = []

    def ours(graph: Graph, context: Context) -> int:
        log.append("ours")
        return 3

    monkeypatch.setattr(pipeline, "PASSES", [pipeline.Pass(ours, "post_grad", "the only one")])
    context = replace(CONTEXT, results=[])
    PostGradPasses([Named("a", log), Named("b", log)], context)(Graph())
    assert log == ["a", "b", "ours"]
    assert [(result.name, result.matches) for result in context.results] == [("ours", 3)]


@pytest.mark.parametrize("module", ["fp8_compile.passes.one_fp8_copy", "fp8_compile.backend"])
def test_import_needs_nothing_before_it(module: str) -> None:
    """An operator that only exists once some part of Inductor is loaded is loaded with it."""
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
