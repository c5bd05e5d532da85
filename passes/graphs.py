"""What every pass asks of a graph: a node's example value, its mutations, a copy of a graph."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node


def example(node: Node) -> Any:
    """The fake value that Dynamo saw at ``node``."""
    return node.meta.get("example_value")


def row_count(shape: Sequence[int | torch.SymInt]) -> float:
    """How many rows a tensor of this shape has: the product of all dimensions but the last.

    A symbolic size counts as the size seen while tracing, without a guard on it; a size that nobody knows yet as
    infinite.
    """
    rows: float = 1
    for size in shape[:-1]:
        if isinstance(size, torch.SymInt):
            hint = size.node.hint
            rows *= math.inf if hint is None else int(hint)
        else:
            rows *= size
    return rows


def mutates(node: Node) -> bool:
    """Whether ``node`` may write into one of its inputs. Dynamo's graph is not functional yet; in doubt, it does."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    if node.op != "call_function":
        return node.op == "call_module"
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return name == "setitem" or (
            name.startswith("i") and name not in ("index", "indexOf", "inv", "invert", "is_", "is_not")
        )
    if (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("out") is not None:
        return True
    return bool(node.kwargs.get("inplace")) or _positional_inplace(target, node)


def _positional_inplace(target: Any, node: Node) -> bool:
    if True not in node.args:
        return False
    try:
        bound = inspect.signature(target).bind_partial(*node.args)
    except (TypeError, ValueError):  # a builtin without a signature
        return True
    return bool(bound.arguments.get("inplace"))


def copy_graph_module(gm: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph that may be edited and compiled.

    Dynamo reads its own graph after the backend has returned, so the original must stay as it is. The sources and the
    metadata are what AOTAutograd tells parameters from inputs by.
    """
    graph = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    return copied
