"""Find the linear layers of a graph, in whichever way they were written, and what multiplies by experts' matrices."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .graphs import aten_name, example, is_call, size_hint


@dataclass(frozen=True)
class Linear:
    """``node = input @ weight.T + bias``, or ``input @ weight + bias`` where the weight is ``transposed``.

    Attributes:
        node: what computes it.
        input: ``[..., K]``.
        weight: where the weight comes from, ``[N, K]``, or ``[K, N]`` if transposed: a placeholder if it is a
            parameter.
        transposed: the parameter is stored input features first (transformers' ``Conv1D``).
        bias: ``[N]`` or None.
        offs: of a `grouped_mm`, whose weight is a stack of such matrices, one for each expert: where in the input each
            expert's tokens end, ``[E]``; None if it has none.
    """

    node: Node
    input: Node
    weight: Node
    transposed: bool
    bias: Node | None = None
    offs: Node | None = None

    @property
    def features(self) -> tuple[int, int]:
        """Input and output features; (0, 0) if the weight is no matrix, nor a stack of them."""
        features = features_of(self.weight)
        return features[::-1] if self.transposed else features

    @property
    def unusual(self) -> str | None:
        """Why this is no plain linear after all, or None."""
        if _is_grouped(self.node):
            x, weight = (example(node).dim() for node in (self.input, self.weight))
            if (x, weight) != (2, 3):
                return f"grouped_mm of {x} and {weight} dimensions, not 2 and 3"
            return None if self.bias is None else "grouped_mm with a bias"
        if len(example(self.weight).shape) != 2:
            return "weight is not a matrix"
        if self.node.kwargs.get("out") is not None:
            return "result is written into a given tensor"
        if any(self.node.kwargs.get(name, 1) != 1 for name in ("beta", "alpha")):
            return "addmm with beta or alpha"
        if self.bias is not None and tuple(example(self.bias).shape) != self.features[1:]:
            addmm = not self._is_function
            return "addmm whose summand is no bias vector" if addmm else "bias has not one value per output feature"
        return None

    @property
    def experts(self) -> int | None:
        """How many matrices the weight is a stack of; None if it is a matrix."""
        shape = example(self.weight).shape
        return int(shape[0]) if len(shape) == 3 else None

    @property
    def _is_function(self) -> bool:
        return is_call(self.node, torch.nn.functional.linear, "linear")


def features_of(weight: Node) -> tuple[int, int]:
    """Input and output features of ``weight``, ``[N, K]`` or a stack of such; (0, 0) if it is something else."""
    shape = getattr(example(weight), "shape", ())
    if len(shape) not in (2, 3):
        return 0, 0
    out_features, in_features = (int(size_hint(size)) for size in shape[-2:])
    return in_features, out_features


def find_linears(graph: Graph) -> Iterator[Linear]:
    """All linears of ``graph``, in its order.

    ``F.linear`` always is one. ``mm``, ``matmul`` and ``addmm`` are if their right operand is a parameter, be it behind
    transpositions; otherwise they are products of activations, such as attention's. ``grouped_mm`` always is one.
    """
    for node in graph.nodes:
        linear = as_linear(node)
        if linear is not None:
            yield linear


_PRODUCTS = ((torch.mm, "mm"), (torch.matmul, "matmul"), (operator.matmul, "__matmul__"))


def as_linear(node: Node) -> Linear | None:
    """``node`` as a linear, or None if it is something else."""
    args, kwargs = node.args, node.kwargs
    if is_call(node, torch.nn.functional.linear, "linear"):
        x, weight, bias = (_argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
        origin, transposed = _origin(weight)
        return Linear(node, x, origin, transposed, bias)
    if _is_grouped(node):
        x, weight = (_argument(node, i, name) for i, name in enumerate(("self", "mat2")))
        origin, transposed = _origin(weight)
        offs, bias = (_argument(node, i, name) for i, name in ((2, "offs"), (3, "bias")))
        return Linear(node, x, origin, not transposed, bias, offs)
    if is_call(node, torch.addmm, "addmm"):
        bias, x, weight = (_argument(node, i, name) for i, name in enumerate(("input", "mat1", "mat2")))
    elif any(is_call(node, *way) for way in _PRODUCTS):
        x, bias = _argument(node, 0, "input"), None
        weight = args[1] if len(args) > 1 else kwargs.get("mat2", kwargs.get("other"))
    else:
        return None
    if not isinstance(x, Node) or not isinstance(weight, Node):
        return None
    origin, transposed = _origin(weight)
    return Linear(node, x, origin, not transposed, bias) if _is_matrix_parameter(origin) else None


def _is_grouped(node: Node) -> bool:
    """Whether ``node`` is what Dynamo makes of ``torch.nn.functional.grouped_mm``."""
    return is_call(node, torch._grouped_mm, "_grouped_mm")


def other_readers(graph: Graph, is_weight: Callable[[Node], bool]) -> Iterator[tuple[Node, Node]]:
    """Matrices that are multiplied in ways that are no linear: each parameter, and a node that reads it.

    Not those of embeddings, nor what is read by elementwise code or alone, as a norm is.

    Args:
        is_weight: whether a placeholder is a parameter of interest.
    """
    linears = {linear.weight for linear in find_linears(graph)}
    for weight in graph.find_nodes(op="placeholder"):
        if weight in linears or not is_weight(weight):
            continue
        for reader in _readers(weight):
            if _multiplies(reader, weight):
                yield weight, reader
                break


def _readers(weight: Node) -> Iterator[Node]:
    for user in weight.users:
        if is_relayout(user):
            yield from _readers(user)
        else:
            yield user


def _multiplies(reader: Node, weight: Node) -> bool:
    """Whether ``reader`` computes more of ``weight`` and another tensor than one value of each two."""
    operands = [n for n in reader.all_input_nodes if isinstance(example(n), torch.Tensor)]
    if reader.op == "output" or len(operands) < 2 or is_call(reader, torch.nn.functional.embedding, "embedding"):
        return False
    if isinstance(reader.target, torch._ops.HigherOrderOperator):  # whose own graph is looked into
        return False
    if is_call(reader, operator.getitem, "__getitem__") or is_call(reader, operator.setitem, "__setitem__"):
        return False
    out = example(reader)
    if not isinstance(out, torch.Tensor):
        return True
    shapes = [[size_hint(size) for size in example(n).shape] for n in operands]
    elementwise = _broadcast(shapes) == [size_hint(size) for size in out.shape]
    return not elementwise or getattr(reader.target, "__name__", str(reader.target)) in _CONTRACTIONS


def _broadcast(shapes: list[list[float]]) -> list[float] | None:
    """The shape of an elementwise result; None if there is none."""
    result = []
    for sizes in itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        different = set(sizes) - {1}
        if len(different) > 1:
            return None
        result.append(different.pop() if different else 1)
    return result[::-1]


# Their result may have the shape of an elementwise one, if all sizes are equal.
_CONTRACTIONS = ("einsum", "inner", "tensordot", "matmul", "mm", "bmm", "baddbmm", "addbmm", "chain_matmul", "mv")


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


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


# How Dynamo writes ``w.T`` and ``w.mT`` from torch 2.15 on; before, as getattr.
_PROPERTIES = (torch.ops.aten.numpy_T, torch.ops.aten.mT)


def _is_transposition(node: Node) -> bool:
    """Of a matrix, or of all those in a stack."""
    count = example(node).dim() if isinstance(example(node), torch.Tensor) else 0
    if count not in (2, 3):
        return False
    if (
        (is_call(node, torch.t, "t") and count == 2)
        or (node.target is getattr and node.args[1] in ("T", "mT")[count - 2 :])
        or node.target in _PROPERTIES[count - 2 :]
    ):
        return True
    given = [*node.args[1:], *node.kwargs.values()]
    dims = [d % count for arg in given for d in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(d, int)]
    if is_call(node, torch.transpose, "transpose"):
        return sorted(dims) == [count - 2, count - 1]
    return is_call(node, torch.permute, "permute") and dims == [*range(count - 2), count - 1, count - 2]


def _is_identity(node: Node, source: Node) -> bool:
    method = node.target if node.op == "call_method" else aten_name(node)
    if method not in ("to", "type_as", "contiguous", "detach"):
        return False
    before, after = example(source), example(node)
    return isinstance(after, torch.Tensor) and (before.dtype, before.device) == (after.dtype, after.device)


_SEGMENT = re.compile(r"""\[(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]|\[(?P<index>\d+)\]|\.(?P<name>[^.\[]+)""")
_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})


def _segments(source: str) -> list[str]:
    return [
        ast.literal_eval(m["quoted"]) if m["quoted"] else m["index"] or m["name"] for m in _SEGMENT.finditer(source)
    ]


def source_path(source: str) -> str:
    """A module path out of the name of a Dynamo source.

    ``L['self']._modules['blocks']._modules['0']._parameters['weight']`` gives ``blocks.0.weight``; the first part is
    the region's own name and is dropped.
    """
    return ".".join(s for s in _segments(source)[1:] if s not in _CONTAINERS)


def parameter_path(source: str) -> str:
    """The path of the layer whose parameter has this source: ``weight`` is left out.

    A parameter that is a variable of a function is called as that is.
    """
    segments = _segments(source)
    return segments[0] if len(segments) == 1 else re.sub(r"(^|\.)weight$", "", source_path(source))


def parameter_path_of(placeholder: Node) -> str:
    """The path of the layer whose parameter ``placeholder`` is, relative to the compiled region; "" if it has none."""
    source = getattr(placeholder, "_dynamo_source", None)
    return "" if source is None else parameter_path(source.name)


def module_of_node(node: Node) -> str:
    """The path of the module that is running at ``node``, relative to the compiled region, or ""."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return source_path(stack[-1][0]) if stack else ""


def running_path(linear: Linear) -> str:
    """The path of the module that is running at ``linear``, relative to the compiled region, or ""."""
    return module_of_node(linear.node)


def module_path(linear: Linear) -> str:
    """The path of the layer that ``linear`` belongs to, relative to the compiled region.

    The parameter's own place says it, ``weight`` left out; where a parameter is shared, the module that is running.
    """
    running = running_path(linear)
    owned = parameter_path_of(linear.weight)
    if getattr(linear.weight, "_dynamo_source", None) is None:
        return running or linear.node.name
    return owned if not running or owned == running or owned.startswith(running + ".") else running
