"""The spec that graphs are checked by between passes finds what a wrong pass leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph

from fp8_compile.passes import pipeline, spec
from fp8_compile.passes.context import Context
from fp8_compile.passes.graphs import example
from fp8_compile.passes.pipeline import PASSES, Pass, rewrite
from tests.support.blocks import OPTIONS, model, tokens
from tests.support.graphs import Call, capture, context, rand


def after(wrong: Any, *others: Pass, stage: Any = "dynamo", at: int | None = None) -> Context:
    """Run the passes on Dynamo's graph with ``wrong`` among them, behind the others or at a place."""
    passes = list(PASSES)
    passes.insert(len(passes) if at is None else at, Pass(wrong, stage, "a test"))
    made = context(capture(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).bfloat16(), rand(8, 64)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PASSES", tuple(passes))
        rewrite(made, lambda stage, make: None)
    return made


def test_a_pass_that_changes_nothing_passes() -> None:
    assert [r.name for r in after(lambda graph, context: 0).results][-1] == "<lambda>"


def constant_erased(graph: Graph, context: Context) -> int:
    context.constants[0] = context.constants[1]
    graph.find_nodes(op="placeholder")[-1].name = "renamed"
    return 1


def other_dtype(graph: Graph, context: Context) -> int:
    node = next(n for n in graph.nodes if n.name == context.constants[0].placeholders[0])
    node.meta["example_value"] = example(node).to(torch.uint8)
    return 1


def linear_erased(graph: Graph, context: Context) -> int:
    node = graph.find_nodes(op="call_function", target=torch.nn.functional.linear)[0]
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)
    return 1


def input_behind(graph: Graph, context: Context) -> int:
    with graph.inserting_before(graph.output_node()):
        graph.placeholder("late").meta["example_value"] = torch.ones(1)
    return 1


@pytest.mark.parametrize(
    ("wrong", "at", "message"),
    [
        (constant_erased, None, "is no input"),
        (other_dtype, None, r"the constant _0_weight is torch\.uint8"),
        (linear_erased, 1, r"the linear \w+ \(0\) is not there"),
        (input_behind, None, "stands behind other nodes"),
    ],
)
def test_what_a_wrong_pass_does_is_found(wrong: Any, at: int | None, message: str) -> None:
    with pytest.raises(spec.SpecError, match=f"{wrong.__name__}: .*{message}"):
        after(wrong, at=at)


def test_it_runs_with_dump_graphs_and_not_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    ran = ["plan_linears", "quantize_attention", "real_rotary", "rotary_pairs", "float32_attention", "quantize_linears"]
    checked: list[str] = []
    monkeypatch.setattr(spec, "enabled", False)
    monkeypatch.setattr(spec, "check", lambda graph, context, stage, after, before: checked.append(after))
    for options in ({}, {"dump_graphs": str(tmp_path)}):
        with torch.no_grad():
            torch.compile(model(1), backend="fp8_diffusion", options={**OPTIONS, **options})(tokens())
        torch.compiler.reset()
        assert checked == (ran if options else [])


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: nn.functional.linear(nn.functional.linear(x, m.a), m.b),  # in a function, both have the path ""
        lambda m, x: nn.functional.linear(x, m.a) @ m.a,  # one weight in both layouts
    ],
)
def test_layers_of_one_path(function: Any) -> None:
    made = context(capture(Call(function, a=(128, 64), b=(256, 128)), rand(8, 64)))
    rewrite(made, lambda stage, make: None)
    assert len(made.plan.quantized) == 2


@pytest.mark.inductor
def test_what_a_pass_of_the_users_leaves_behind_is_not_our_fault() -> None:
    def untidy(graph: Graph) -> None:
        with graph.inserting_before(graph.output_node()):
            graph.call_function(torch.ops.aten.neg.default, (graph.find_nodes(op="placeholder")[0],))

    options = {**OPTIONS, "inner_backend": "inductor", "post_grad_custom_post_pass": untidy}
    with torch.no_grad():
        torch.compile(model(1), backend="fp8_diffusion", options=options)(tokens())
