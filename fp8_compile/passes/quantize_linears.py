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

The new placeholders are only described here (`Constants`): the weights are still unknown, since one graph may run with
the parameters of many blocks. An activation with several readers is quantized once here, because no search for common
subexpressions runs on inference graphs.

With static scales, a quantization takes constants, too: the input scale of its first reader, which the layers of all
its readers must have, and ones (`fp8_compile.schemes.Call`)::

    (2) q = quantize_static_rowwise(x, to_q_input_scale, ones)

A ``grouped_mm`` of the matrices of experts becomes, with constants that are stacks of each matrix's::

    (2) q = quantize_rowwise(x)
    (3) y = grouped_linear(q, gate_up_proj, gate_up_proj_scale, offs, torch.bfloat16)

It refuses nothing; what must stay is not in the plan. A linear whose input may have been written into since it was
quantized gets a quantization of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from ..schemes import MOST_ROWS, ONES, Call, Scheme
from ..weights.quantized_weight import QuantizedWeight
from .context import Constants, Context, Decision
from .graphs import call, example, storages, substitute, written_storages
from .linears import Linear, as_linear, is_relayout


def quantize_linears(graph: Graph, context: Context) -> int:
    """Rewrite ``graph``, a copy of Dynamo's, in place, as ``context.plan`` says; sets ``context.constants``.

    Counts the linears that were replaced.
    """
    chosen = {d.node: d for d in context.plan.quantized}
    if not chosen:  # perhaps without any input: what lies between two graph breaks may read nothing
        return 0
    rewriter = _Rewriter(graph)
    for node in list(graph.nodes):
        if written := written_storages(node):
            rewriter.forget_quantized(written)
        linear = as_linear(node) if node.name in chosen else None
        if linear is not None:
            rewriter.replace(linear, chosen[node.name])
    for weight in {weight for weight, _, _ in rewriter.constants}:
        _erase_unused(weight)
    context.constants = sorted((made for made, _ in rewriter.constants.values()), key=lambda c: not c.prequantized)
    context.ones, context.together = list(rewriter.ones), rewriter.together
    return len(chosen)


# How Dynamo marks a parameter: its address never changes, so CUDA graphs need no copy of it.
_STATIC = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


class _Rewriter:
    """What is known half-way through a graph: constants described, activations quantized."""

    def __init__(self, graph: Graph) -> None:
        self.constants: dict[tuple[Node, Any, bool], tuple[Constants, list[Node]]] = {}
        self._graph = graph
        self.ones: dict[torch.device, Node] = {}
        self.together: set[tuple[str, str]] = set()
        # With the weight of the linear that it was made for.
        self._quantized: dict[tuple[Node, Any, Any], tuple[Node, str]] = {}
        placeholders = graph.find_nodes(op="placeholder")
        self._last = dict.fromkeys((True, False), placeholders[-1])  # of the prequantized, of the others

    def forget_quantized(self, written: set[int]) -> None:
        """Quantize anew, when they are next needed, the activations whose memory was written into."""
        for stale in [key for key in self._quantized if written & storages(key[0])]:
            del self._quantized[stale]

    def replace(self, linear: Linear, decision: Decision) -> None:
        """Put quantization and a scaled matmul in the place of ``linear``."""
        scheme, how, node = decision.scheme, decision.call, linear.node
        assert scheme is not None
        assert how is not None
        assert how.linear is not None
        key = linear.weight, scheme.constants_key(), linear.transposed
        if key not in self.constants:
            self.constants[key] = self._describe(linear, scheme, decision.within)
        operands = self.constants[key][1]
        named = dict(zip(scheme.specs(1, 1), operands, strict=True))
        with self._graph.inserting_before(node):
            x = self._quantize(linear, how, scheme.constants_key() if how.takes else None, named)
        added = linear.bias if linear.experts is None else linear.offs
        substitute(node, how.linear, x, *how.operands_of(named), added, example(node).dtype)

    def _quantize(self, linear: Linear, how: Call, same: Any, constants: Mapping[str, Node]) -> Node:
        """The activation as ``how`` wants it; linears share one where they also agree in ``same``."""
        if how.quantize is None:
            return linear.input
        key = linear.input, how.quantize, same
        if key not in self._quantized:
            given = [self._ones(linear.input) if name == ONES else constants[name] for name in how.takes]
            self._quantized[key] = call(linear.node, how.quantize, linear.input, *given), linear.weight.name
        node, first = self._quantized[key]
        if how.takes and first != linear.weight.name:
            self.together.add((first, linear.weight.name))
        return node

    def _ones(self, like: Node) -> Node:
        """Taken after all constants."""
        value = example(like)
        if value.device not in self.ones:
            made = torch.empty((MOST_ROWS, 1), dtype=torch.float32, device="meta")
            with self._graph.inserting_after(self._graph.find_nodes(op="placeholder")[-1]):
                new = self._graph.placeholder(ONES)
            new.meta = {"example_value": FakeTensor(value.fake_mode, made, value.device), **_STATIC}
            new.target, new._dynamo_source = new.name, None
            self.ones[value.device] = new
        return self.ones[value.device]

    def _describe(self, linear: Linear, scheme: Scheme, path: str) -> tuple[Constants, list[Node]]:
        weight = example(linear.weight)
        prequantized = isinstance(weight, QuantizedWeight)
        in_features, out_features = linear.features
        nodes = []
        for i, (name, spec) in enumerate(scheme.specs_of(out_features, in_features, linear.experts).items()):
            if prequantized:
                value = weight.constants[i]
            else:
                made = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                value = FakeTensor(weight.fake_mode, made, weight.device)
            with self._graph.inserting_after(self._last[prequantized]):
                suffix = f"_{name}" if i else ""
                of_parameter = path if linear.experts else f"{path}.weight".lstrip(".")
                new = self._graph.placeholder(re.sub(r"\W", "_", f"{of_parameter}{suffix}"))
            new.meta = {"example_value": value, **_STATIC}
            new.target = new.name  # one weight read in both layouts asks for the same name twice
            new._dynamo_source = None
            nodes.append(new)
            if self._last[False] is self._last[prequantized]:
                self._last[False] = new
            self._last[prequantized] = new
        names = tuple(node.name for node in nodes)
        return Constants(linear.weight.name, scheme, linear.transposed, names, prequantized), nodes


def _erase_unused(node: Node) -> None:
    """Erase a weight, and the transpositions behind it, that nothing reads any more.

    Not ``eliminate_dead_code``: in Dynamo's graph an in-place method whose result is unused counts as dead.
    """
    for user in list(node.users):
        if is_relayout(user):
            _erase_unused(user)
    if not node.users:
        node.graph.erase_node(node)
