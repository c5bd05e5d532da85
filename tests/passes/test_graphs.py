from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fp8_compile.passes.graphs import copy_graph, example, module_of, row_count, written_storages
from tests.support.graphs import Call, capture, rand

Function = Callable[..., Any]


@pytest.fixture
def custom_ops() -> Iterator[None]:
    with torch.library._scoped_library("fp8_compile_test", "FRAGMENT") as library:
        library.define("write(Tensor(a!) x) -> ()")
        library.define("read(Tensor x) -> Tensor")
        library.impl("write", lambda x: None, "CompositeExplicitAutograd")
        library.impl("read", lambda x: x.clone(), "CompositeExplicitAutograd")
        yield


def writers(body: str) -> list[str]:
    """Those nodes of the graph of ``def function(m, x, y): <body>`` that count as writing."""
    defined: dict[str, Function] = {}
    exec(f"def function(m, x, y):\n    {body}", {"torch": torch, "F": F}, defined)
    graph = capture(Call(defined["function"]), rand(8, 64), rand(8, 64)).graph
    return [node.name for node in graph.nodes if written_storages(node)]


@pytest.mark.parametrize(
    "statement",
    [
        "x[0] = 1",
        "x += 1",
        "x *= y",
        "x /= y",
        "x.add_(1)",
        "x.copy_(y)",
        "x.__setitem__(0, 1)",
        "x.__iadd__(y)",
        "x.__imul__(y)",
        "x.__isub__(y)",
        "x.__itruediv__(y)",
        "torch.relu_(x)",
        "F.relu_(x)",
        "F.relu(x, inplace=True)",
        "F.relu(x, True)",
        "F.silu(x, True)",
        "F.leaky_relu(x, 0.1, True)",
        "F.hardtanh(x, -1.0, 1.0, True)",
        "F.dropout(x, 0.5, False, True)",
        "torch.add(x, y, out=x)",
        "torch.mul(x, y, out=y)",
        "torch._foreach_add_([x, y], 1)",
        "torch.ops.aten.add_(x, y)",
        "torch.ops.aten.add_.Tensor(x, y)",
        "torch.ops.aten.add.out(x, y, out=x)",
        "torch.ops.fp8_compile_test.write(x)",
        "torch.ops.fp8_compile_test.write.default(x)",
    ],
)
def test_writing(statement: str, custom_ops: None) -> None:
    assert len(writers(f"{statement}; return x, y")) == 1


@pytest.mark.parametrize(
    "expression",
    [
        "x + 1",
        "-x",
        "~(x > y)",
        "x[0]",
        "x.sum(1)",
        "x.view(-1).float().t()",
        "torch.add(x, 1)",
        "torch.cat((x, y), 1)",
        "torch.chunk(x, 2, 1)",
        "torch.unsqueeze(x, 1)",
        "F.relu(x)",
        "F.relu(x, inplace=False)",
        "F.silu(x, False)",
        "F.dropout(x, 0.5, True)",
        "F.layer_norm(x, (64,))",
        'F.gelu(x, approximate="tanh")',
        "torch.ops.aten.add(x, y)",
        "torch.ops.aten.add.Tensor(x, y)",
        "torch.ops.fp8_compile_test.read(x)",
        "torch.ops.fp8_compile_test.read.default(x)",
    ],
)
def test_reading(expression: str, custom_ops: None) -> None:
    assert writers(f"return {expression}") == []


def test_higher_order_operators_count_as_writing() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    graph = capture(Branch(), rand(8, 64)).graph
    assert [node.target for node in graph.nodes if written_storages(node)] == [torch.ops.higher_order.cond]


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((64,), 1), ((8, 64), 8), ((2, 3, 64), 6), ((2, 3, 4, 64), 24), ((0, 64), 0), ((5, 0, 64), 0)],
    ids=str,
)
def test_row_count(shape: tuple[int, ...], rows: int) -> None:
    assert row_count(shape) == rows


def test_row_count_of_symbolic_sizes_sets_no_guard() -> None:
    *_, node, _ = capture(Call(lambda m, x: x + 1), rand(3, 8, 64), dynamic=True).graph.nodes
    shape = example(node).shape
    assert [type(size) for size in shape[:2]] == [torch.SymInt] * 2
    environment = shape[0].node.shape_env
    guards = len(environment.guards)
    assert row_count(shape) == 24
    assert len(environment.guards) == guards


def test_row_count_of_unknown_sizes_is_infinite() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        *_, node, _ = capture(Call(lambda m, x, mask: x[mask] + 1), rand(8, 64), torch.arange(8) > 3).graph.nodes
    assert row_count(example(node).shape) == math.inf


def _shared_module() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 32)).bfloat16()


def _copy(gm: GraphModule) -> GraphModule:
    return module_of(copy_graph(gm), gm)


def test_copy_has_the_same_text_and_sources() -> None:
    gm = capture(_shared_module(), rand(8, 64)).gm
    copied = _copy(gm)
    assert str(copied.graph) == str(gm.graph)
    assert copied.graph is not gm.graph
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        assert new is not old
        assert new.meta == old.meta
        assert getattr(new, "_dynamo_source", "none") is getattr(old, "_dynamo_source", "none")
    assert sum(getattr(n, "_dynamo_source", None) is not None for n in copied.graph.nodes) == 5


def test_copy_carries_what_aotautograd_reads_of_the_module() -> None:
    gm = capture(_shared_module(), rand(8, 64)).gm
    gm.meta["mark"] = "kept"
    copied = _copy(gm)
    assert copied.meta == gm.meta
    assert copied.meta is not gm.meta
    assert gm._param_name_to_source
    assert copied._param_name_to_source == gm._param_name_to_source
    assert copied.compile_subgraph_reason is gm.compile_subgraph_reason


def test_copy_is_independent() -> None:
    captured = capture(_shared_module(), rand(8, 64))
    text, placeholder = str(captured.graph), captured.graph.find_nodes(op="placeholder")[0]
    copied = _copy(captured.gm)
    *_, node, _ = copied.graph.nodes
    node.target = torch.mul
    node.meta["mark"] = True
    copied.graph.find_nodes(op="placeholder")[0].meta.clear()
    copied.meta["mark"] = True
    assert str(captured.graph) == text
    assert "example_value" in placeholder.meta
    assert not any("mark" in n.meta for n in captured.graph.nodes)
    assert "mark" not in captured.gm.meta


def test_copy_computes_the_same() -> None:
    captured = capture(_shared_module(), rand(8, 64))
    with torch.no_grad():
        torch.testing.assert_close(_copy(captured.gm)(*captured.inputs), captured.gm(*captured.inputs))


def test_copy_keeps_the_bodies_of_higher_order_operators() -> None:
    module = Call(lambda m, x: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)))
    captured = capture(module, rand(8, 64))
    copied = _copy(captured.gm)
    torch.testing.assert_close(copied(*captured.inputs), captured.gm(*captured.inputs))
