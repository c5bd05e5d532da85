"""Rewrite the linears that the plan chose into quantization and a scaled matrix multiplication.

Before::

    (1) w: placeholder, bfloat16 [N, K]
    (2) y = linear(x, w, b)
    (3) z = linear(x, v, None)

After::

    (1) to_q_weight: placeholder, float8_e4m3fn [N, K];  to_q_weight_scale: placeholder, float32 [N, 1]
    (2) q = quantize_rowwise(x)
    (3) y = scaled_linear(q, to_q_weight, to_q_weight_scale, b, torch.bfloat16)
    (4) z = scaled_linear(q, to_k_weight, to_k_weight_scale, None, torch.bfloat16)

The new placeholders are only described here (`Constant`): the weights are still unknown, since one graph may run with
the parameters of many blocks. Why the activation is quantized once here and not by a later search for common
subexpressions: no such search runs on inference graphs.

It refuses nothing; what must stay is not in the plan. A linear whose input may have been written into since it was
quantized gets a quantization of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from ..schemes.fp8 import Scheme
from ..weights.quantized_weight import Fp8Weight
from .graphs import call, example, storages, written_storages
from .linears import Linear, as_linear, is_relayout
from .plan import Decision, Plan


@dataclass(frozen=True)
class Constant:
    """Constants that a rewritten graph needs of one parameter.

    Attributes:
        weight: name of the parameter's placeholder in the original graph.
        scheme: whose ``quantize_weight`` makes them.
        transposed: the parameter is stored ``[K, N]``.
        path: of the layer that needs them first, for messages.
        placeholders: their names in the rewritten graph, in the order of ``scheme.constants``.
        held: the parameter is an `Fp8Weight`, and the constants are the tensors in it. The placeholders of these come
            before those of the others.
    """

    weight: str
    scheme: Scheme
    transposed: bool
    path: str
    placeholders: tuple[str, ...]
    held: bool = False


def quantize_linears(graph: Graph, plan: Plan) -> list[Constant]:
    """Rewrite ``graph`` in place.

    Args:
        graph: a copy of Dynamo's graph.
        plan: made for that graph.

    Returns:
        The constants that the graph now takes instead of the weights, in the order in which it takes them.
    """
    chosen = {d.node: d for d in plan.converted}
    rewriter = _Rewriter(graph)
    for node in list(graph.nodes):
        if written := written_storages(node):
            rewriter.forget_quantized(written)
        linear = as_linear(node) if node.name in chosen else None
        if linear is not None:
            rewriter.replace(linear, chosen[node.name])
    for weight in {weight for weight, _, _ in rewriter.constants}:
        _erase_unused(weight)
    graph.lint()
    return sorted((constant for constant, _ in rewriter.constants.values()), key=lambda c: not c.held)


class _Rewriter:
    """What is known half-way through a graph: constants described, activations quantized."""

    def __init__(self, graph: Graph) -> None:
        self.constants: dict[tuple[Node, Scheme | None, bool], tuple[Constant, list[Node]]] = {}
        self._graph = graph
        self._quantized: dict[tuple[Node, Any], Node] = {}
        self._layouts: dict[Any, Any] = {}
        self._last = dict.fromkeys((True, False), graph.find_nodes(op="placeholder")[-1])  # of the held, of the others

    def forget_quantized(self, written: set[int]) -> None:
        """Quantize anew, when they are next needed, the activations whose memory was written into."""
        for stale in [key for key in self._quantized if written & storages(key[0])]:
            del self._quantized[stale]

    def replace(self, linear: Linear, decision: Decision) -> None:
        """Put quantization and a scaled matmul in the place of ``linear``."""
        scheme, node = decision.scheme, linear.node
        assert scheme is not None
        held = isinstance(example(linear.weight), Fp8Weight)
        key = linear.weight, None if held else scheme, linear.transposed  # with few rows or many, it is the same tensor
        if key not in self.constants:
            self.constants[key] = self._describe(linear, scheme, decision.path)
        operands = self.constants[key][1]
        with self._graph.inserting_before(node):
            x = self._quantize(linear, scheme)
            new = call(node, scheme.linear, x, *operands, linear.bias, example(node).dtype)
        new.meta["example_value"] = example(node)
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)

    def _quantize(self, linear: Linear, scheme: Scheme) -> Node:
        if scheme.quantize is None:
            return linear.input
        key = linear.input, scheme.quantize
        if key not in self._quantized:
            self._quantized[key] = call(linear.node, scheme.quantize, linear.input)
        return self._quantized[key]

    def _describe(self, linear: Linear, scheme: Scheme, path: str) -> tuple[Constant, list[Node]]:
        nodes = []
        weight = example(linear.weight)
        held = isinstance(weight, Fp8Weight)
        values = [weight.qdata, weight.scale] if held else self._fake_constants(weight, scheme, linear.transposed)
        for name, value in zip(scheme.constants, values, strict=True):
            with self._graph.inserting_after(self._last[held]):
                new = self._graph.placeholder(re.sub(r"\W", "_", f"{path}.{name}".lstrip(".")))
            # How Dynamo marks a parameter: its address never changes, so CUDA graphs need no copy of it.
            new.meta = {"example_value": value, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
            new.target = new.name  # one weight read in both layouts asks for the same name twice
            new._dynamo_source = None
            nodes.append(new)
            if self._last[False] is self._last[held]:
                self._last[False] = new
            self._last[held] = new
        names = tuple(node.name for node in nodes)
        return Constant(linear.weight.name, scheme, linear.transposed, path, names, held), nodes

    def _fake_constants(self, weight: Any, scheme: Scheme, transposed: bool) -> list[Any]:
        """What the scheme makes of a fake weight. Weights of one shape are worked out once: a model has few shapes."""
        key = weight.shape, weight.stride(), weight.dtype, weight.device, scheme, transposed
        if key not in self._layouts:
            with weight.fake_mode:
                made = scheme.make_constants(weight, transposed)
                self._layouts[key] = [(c.shape, c.stride(), c.dtype, c.device) for c in made]
        # Never the same fake tensor twice: AOTAutograd would take two inputs for one.
        return [
            FakeTensor(weight.fake_mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)
            for size, stride, dtype, device in self._layouts[key]
        ]


def _erase_unused(node: Node) -> None:
    """Erase a weight, and the transpositions behind it, that nothing reads any more.

    Not ``eliminate_dead_code``: in Dynamo's graph an in-place method whose result is unused counts as dead.
    """
    for user in list(node.users):
        if is_relayout(user):
            _erase_unused(user)
    if not node.users:
        node.graph.erase_node(node)
