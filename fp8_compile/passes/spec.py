"""What must hold of a graph after each pass, checked in tests and where graphs are dumped."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Graph, Node

from ..schemes import Spec
from .context import Constants, Context
from .graphs import example
from .linears import as_linear

enabled = False
"""Check after every pass of every compilation; the tests switch it on."""


class SpecError(AssertionError):
    """A pass left a graph that the next stage cannot take: a bug of this package."""


def check(graph: Graph, context: Context, stage: str, after: str, before: Set[Node] = frozenset()) -> None:
    """Raise `SpecError` if ``graph`` is not what it must be after the pass ``after``.

    1. It is well-formed (``Graph.lint``), and its inputs come first.
    2. Of "dynamo" graphs: each constant is an input with the shape and the dtype of its `Spec`; a linear that the plan
       quantizes is there before `quantize_linears`, and gone after it.
    3. Of "post_grad" graphs: every tensor that was not there ``before`` has a value in its metadata, which Inductor
       reads.
    """
    graph.lint()
    nodes = list(graph.nodes)
    seen = False
    for node in nodes:
        if node.op != "placeholder":
            seen = True
        elif seen:
            raise SpecError(f"{after}: the input {node.name} stands behind other nodes")
    if stage == "post_grad":
        for node in nodes:
            if node not in before and node.op == "call_function" and "val" not in node.meta and _returns_a_tensor(node):
                raise SpecError(f"{after}: {node.format_node()} has no value in its metadata")
        return
    by_name = {node.name: node for node in nodes}
    for constants in context.constants:
        specs = _specs(context, constants)
        for name, spec in zip(constants.placeholders, specs, strict=True):
            if name not in by_name or by_name[name].op != "placeholder":
                raise SpecError(f"{after}: the constant {name} of {constants.weight} is no input")
            value = example(by_name[name])
            if (tuple(value.shape), value.dtype) != (spec.shape, spec.dtype):
                raise SpecError(f"{after}: the constant {name} is {value.dtype} {list(value.shape)}, not {spec}")
    replaced = any(result.name == "quantize_linears" for result in context.results)
    for decision in context.plan.quantized:
        there = decision.node in by_name and as_linear(by_name[decision.node]) is not None
        if there == replaced:
            raise SpecError(f"{after}: the linear {decision.node} ({decision.path}) is {'' if there else 'not '}there")


def _specs(context: Context, constants: Constants) -> list[Spec]:
    key = constants.weight, constants.transposed
    decision = next(d for d in context.plan.quantized if (d.weight, d.transposed) == key)
    made = constants.scheme.specs_of(decision.out_features, decision.in_features, decision.experts)
    return list(made.values())


def _returns_a_tensor(node: Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(isinstance(r.type, torch.TensorType) for r in returns)
