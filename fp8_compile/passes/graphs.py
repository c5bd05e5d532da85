"""What every pass asks of a graph: a node's example value, its mutations, a copy of a graph."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default})
"""Operators of aten that give a contiguous tensor another shape without moving its data."""


def example(node: Node) -> Any:
    """The fake value that Dynamo saw at ``node``."""
    return node.meta.get("example_value")


def is_call(node: Node, function: Any, method: str) -> bool:
    """Whether ``node`` calls ``function``, or the method or the aten operator of that name."""
    ways = (("call_function", function), ("call_method", method))
    return (node.op, node.target) in ways or (aten_name(node) == method and bool(method))


def aten_name(node: Node) -> str:
    """The name of the aten operator that ``node`` calls, as in graphs that torch.export made; empty if it is none."""
    target = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ""
    namespace, _, name = packet._qualified_op_name.partition("::")
    return name if namespace == "aten" else ""


def provenance(node: Node) -> dict[str, Any]:
    """Where ``node`` comes from: what profilers, tlparse and error messages show of a node that replaces it."""
    return {key: node.meta[key] for key in ("nn_module_stack", "source_fn_stack", "stack_trace") if key in node.meta}


def call(origin: Node, function: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node at the graph's insertion point, which calls a function, or a method by name, in ``origin``'s place."""
    make = origin.graph.call_method if isinstance(function, str) else origin.graph.call_function
    node = make(function, args, kwargs)
    node.meta = provenance(origin)
    return node


def substitute(node: Node, function: Any, *args: Any) -> None:
    """Let a call of ``function``, which gives what ``node`` gives, stand in its place."""
    with node.graph.inserting_before(node):
        new = call(node, function, *args)
    new.meta["example_value"] = example(node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def subgraphs(gm: GraphModule, prefix: str = "") -> Iterator[tuple[str, GraphModule]]:
    """What higher-order operators in ``gm`` call, and in turn what those do, by names that are like those of nodes."""
    for node in gm.graph.find_nodes(op="get_attr"):  # Dynamo leaves behind subgraphs that nothing refers to
        inner = getattr(gm, str(node.target), None)
        if isinstance(inner, GraphModule):
            name = f"{prefix}{node.target}"
            yield name, inner
            yield from subgraphs(inner, f"{name}.")


def size_hint(size: int | torch.SymInt) -> float:
    """A size as it was while tracing, without a guard on it; infinite if it is known only at run time."""
    if not isinstance(size, torch.SymInt):
        return size
    hint = getattr(size.node, "hint", None)
    return hint if isinstance(hint, int) else math.inf  # the ragged size of a nested tensor is another SymInt


def row_count(shape: Sequence[int | torch.SymInt]) -> float:
    """How many rows a tensor of this shape has: the product of all dimensions but the last."""
    return math.prod(size_hint(size) for size in shape[:-1])


LARGEST_BATCH = 32
"""A first dimension that is smaller counts as the batch, and else as rows of one sample: tokens.

Packed tokens come in as few: Z-Image pads captions to multiples of 32.
"""


def rows_of_a_sample(shape: Sequence[int | torch.SymInt]) -> float:
    """How many rows of a tensor of this shape belong to one sample, whatever the batch.

    So a layer that is fed once per sample runs in one way for every batch size, and a picture does not depend on what
    is drawn beside it. Infinite where the number of all rows is known only at run time.
    """
    rows = row_count(shape)
    if math.isinf(rows) or len(shape) < 2 or size_hint(shape[0]) >= LARGEST_BATCH:
        return rows
    return row_count(shape[1:])


def storages(tree: Any) -> set[int]:
    """Identities of the memory behind all nodes in ``tree``; views of one tensor share it, as their fake values do."""
    found: set[int] = set()

    def visit(node: Node) -> Node:
        for value in pytree.tree_leaves(example(node)):
            if isinstance(value, torch.Tensor):
                found.add(_memory(value))
        return node

    torch.fx.map_arg(tree, visit)
    return found


def _memory(value: torch.Tensor) -> int:
    if is_traceable_wrapper_subclass(value):  # may have no storage of its own
        return id(value)
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # nor have the tensors that vmap batches
        return id(value)


def written_storages(node: Node) -> set[int]:
    """The memory that ``node`` may write into. Dynamo's graph is not functional yet; in doubt, it writes."""
    if node.op == "call_method" and _INPLACE_METHOD.match(str(node.target)):
        return storages(node.args[:1])
    if node.op == "call_module":
        return storages((node.args, node.kwargs))
    if node.op != "call_function":
        return set()
    target: Any = node.target
    if node.kwargs.get("out") is not None:
        return storages(node.kwargs["out"])
    if isinstance(target, torch._ops.OpOverloadPacket):
        names = [name for name in target.overloads() if not name.endswith("out")]  # type: ignore[no-untyped-call]
        overloads = [getattr(target, name) for name in names]
    else:
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else []
    if overloads:
        return storages((node.args, node.kwargs)) if any(o._schema.is_mutable for o in overloads) else set()
    if isinstance(target, torch._ops.HigherOrderOperator):
        return storages((node.args, node.kwargs))
    first = node.args[:1] or (node.kwargs.get("input"),)
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        writes = name == "setitem" or f"__{name}__" in _INPLACE_DUNDER
    else:
        writes = name.endswith("_") and not name.endswith("__")
    return storages(first) if writes or node.kwargs.get("inplace") or _positional_inplace(target, node) else set()


_INPLACE_DUNDER = {name for name in dir(operator) if name.startswith("__i")} | {"__setitem__"}
_INPLACE_DUNDER -= {"__index__", "__inv__", "__invert__"}
_INPLACE_METHOD = re.compile("|".join([r".*[^_]_$", *sorted(_INPLACE_DUNDER)]))


def _positional_inplace(target: Any, node: Node) -> bool:
    if not any(arg is True for arg in node.args):
        return False
    try:
        bound = inspect.signature(target).bind_partial(*node.args)
    except (TypeError, ValueError):  # a builtin without a signature
        return True
    return bool(bound.arguments.get("inplace"))


def copy_graph(gm: GraphModule) -> Graph:
    """A copy of Dynamo's graph that may be edited; `module_of` makes a module of it again.

    Dynamo reads its own graph after the backend has returned, so the original must stay as it is.
    """
    graph = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        # Dynamo's hold on the real argument. It lets go of its own when the backend has returned; a copy would keep a
        # weak reference to each parameter, and those that hold one cannot be moved by ``torch.utils.swap_tensors``.
        new.meta.pop("grapharg", None)
    return graph


def module_of(graph: Graph, origin: GraphModule) -> GraphModule:
    """What the inner compiler takes: ``graph``, with all that Dynamo attached to ``origin``, whose copy it is.

    The sources and the metadata are what AOTAutograd tells parameters from inputs by. While Dynamo compiles, the Python
    code of the module is generated only if someone asks for it, as with Dynamo's own.
    """
    gm = _make_graph_module(origin, graph)
    gm.meta = dict(origin.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason"):
        if hasattr(origin, name):
            setattr(gm, name, getattr(origin, name))
    return gm
