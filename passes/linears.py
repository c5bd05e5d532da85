"""Find the linear layers of a graph, in whichever way they were written."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .graphs import example


@dataclass(frozen=True)
class Linear:
    """``node = input @ weight.T + bias``, or ``input @ weight + bias`` where the weight is ``transposed``.

    Attributes:
        node: what computes it.
        input: ``[..., K]``.
        weight: where the weight comes from, ``[N, K]``, or ``[K, N]`` if transposed: a placeholder if it is a
        parameter. transposed: the parameter is stored input features first (transformers' ``Conv1D``).
        bias: ``[N]`` or None.
        unusual: why this is no plain linear after all, or None.
    """

    node: Node
    input: Node
    weight: Node
    transposed: bool
    bias: Node | None = None
    unusual: str | None = None


def find_linears(graph: Graph) -> Iterator[Linear]:
    """All linears of ``graph``, in its order.

    ``F.linear`` always is one. ``mm``, ``matmul`` and ``addmm`` are if their right operand is a parameter, be it behind
    transpositions; otherwise they are products of activations, such as attention's.
    """
    for node in graph.nodes:
        linear = as_linear(node)
        if linear is not None:
            yield linear


def as_linear(node: Node) -> Linear | None:
    """``node`` as a linear, or None if it is something else."""
    args: tuple[Any, ...] = node.args
    kwargs = node.kwargs
    if node.op == "call_function" and node.target is torch.nn.functional.linear:
        x, weight, bias = (_argument(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
        origin, transposed = _origin(weight)
        return Linear(node, x, origin, transposed, bias)
    if _is(node, torch.addmm, "addmm"):
        bias, x, weight = (_argument(args, kwargs, i, name) for i, name in enumerate(("input", "mat1", "mat2")))
        origin, transposed = _origin(weight)
        if not _is_matrix_parameter(origin):
            return None
        unusual = None
        if any(kwargs.get(name, 1) != 1 for name in ("beta", "alpha")):
            unusual = "addmm with beta or alpha"
        elif not isinstance(bias, Node) or example(bias).dim() != 1:
            unusual = "addmm whose summand is no bias vector"
        return Linear(node, x, origin, not transposed, bias, unusual)
    if _is(node, torch.mm, "mm") or _is(node, torch.matmul, "matmul") or _is(node, operator.matmul, "__matmul__"):
        x = args[0] if args else kwargs.get("input")
        weight = args[1] if len(args) > 1 else kwargs.get("mat2", kwargs.get("other"))
        if not isinstance(x, Node) or not isinstance(weight, Node):
            return None
        origin, transposed = _origin(weight)
        if _is_matrix_parameter(origin):
            return Linear(node, x, origin, not transposed)
    return None


def _is(node: Node, function: Any, method: str) -> bool:
    return (node.op, node.target) in (("call_function", function), ("call_method", method))


def _argument(args: tuple[Any, ...], kwargs: Any, index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


def _is_matrix_parameter(node: Node) -> bool:
    return node.op == "placeholder" and isinstance(example(node), torch.nn.Parameter) and example(node).dim() == 2


def _origin(weight: Node) -> tuple[Node, bool]:
    """Follow transpositions (and casts that change nothing) up to where ``weight`` comes from.

    Returns:
        The node, and whether an odd number of transpositions lies between. Where the chain ends at something that is
        no parameter, that is ``weight`` itself.
    """
    node, transposed = weight, False
    while node.op != "placeholder":
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or not isinstance(example(source), torch.Tensor):
            return weight, False
        if _is_transposition(node):
            transposed = not transposed
        elif not _is_identity(node, source):
            return weight, False
        node = source
    return node, transposed


def is_relayout(node: Node) -> bool:
    """Whether ``node`` gives the values of its input unchanged but for their order in memory."""
    source = node.args[0] if node.args else None
    return isinstance(source, Node) and (_is_transposition(node) or _is_identity(node, source))


def _is_transposition(node: Node) -> bool:
    if not isinstance(example(node), torch.Tensor) or example(node).dim() != 2:
        return False
    if _is(node, torch.t, "t") or (node.target is getattr and node.args[1] in ("T", "mT")):
        return True
    dims = [d % 2 for d in node.args[1:] if isinstance(d, int)]
    if _is(node, torch.transpose, "transpose"):
        return sorted(dims) == [0, 1]
    return _is(node, torch.permute, "permute") and dims == [1, 0]


def _is_identity(node: Node, source: Node) -> bool:
    if not (node.op == "call_method" and node.target in ("to", "type_as", "contiguous", "detach")):
        return False
    before, after = example(source), example(node)
    return isinstance(after, torch.Tensor) and (before.dtype, before.device) == (after.dtype, after.device)


_SEGMENT = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})


def source_path(source: str) -> str:
    """A module path out of the name of a Dynamo source.

    ``L['self']._modules['blocks']._modules['0']._parameters['weight']`` gives ``blocks.0.weight``; the first part is
    the region's own name and is dropped.
    """
    segments = [a or b or c for a, b, c in _SEGMENT.findall(source)]
    return ".".join(s for s in segments[1:] if s not in _CONTAINERS)


def module_path(linear: Linear) -> str:
    """The path of the layer that ``linear`` belongs to, relative to the compiled region.

    The parameter's own place says it, ``weight`` left out; where a parameter is shared, the module that is running.
    """
    stack = list((linear.node.meta.get("nn_module_stack") or {}).values())
    running = source_path(stack[-1][0]) if stack else ""
    source = getattr(linear.weight, "_dynamo_source", None)
    if source is None:
        return running or linear.node.name
    owned = source_path(source.name).removesuffix(".weight")
    return owned if not running or owned == running or owned.startswith(running + ".") else running
