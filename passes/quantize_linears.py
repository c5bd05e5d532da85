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

from torch.fx import GraphModule, Node

from ..schemes import Scheme
from .graphs import example, storages, written_storages
from .linears import Linear, as_linear, is_relayout
from .plan import Plan


@dataclass(frozen=True)
class Constant:
    """Constants that a rewritten graph needs of one parameter.

    Attributes:
        weight: name of the parameter's placeholder in the original graph.
        scheme: whose ``quantize_weight`` makes them.
        transposed: the parameter is stored ``[K, N]``.
        path: of the layer that needs them first, for messages.
        placeholders: their names in the rewritten graph, in the order of ``scheme.constants``.
    """

    weight: str
    scheme: Scheme
    transposed: bool
    path: str
    placeholders: tuple[str, ...]


def quantize_linears(gm: GraphModule, plan: Plan) -> list[Constant]:
    """Rewrite ``gm`` in place.

    Args:
        gm: a copy of Dynamo's graph.
        plan: made for that graph.

    Returns:
        The constants that the graph now takes instead of the weights.
    """
    chosen = {d.node: d for d in plan.converted}
    constants: dict[tuple[Node, bool], tuple[Constant, list[Node]]] = {}
    quantized: dict[Node, Node] = {}

    for node in list(gm.graph.nodes):
        written = written_storages(node)
        for stale in [x for x in quantized if written & storages(x)]:
            del quantized[stale]
        linear = as_linear(node) if node.name in chosen else None
        if linear is None:
            continue
        key = linear.weight, linear.transposed
        if key not in constants:
            constants[key] = _describe(gm, linear, plan.scheme, chosen[node.name].path)
        _replace(gm, linear, plan.scheme, constants[key][1], quantized)

    for weight in {weight for weight, _ in constants}:
        _erase_unused(weight)
    gm.graph.lint()
    gm.recompile()
    return [constant for constant, _ in constants.values()]


def _describe(gm: GraphModule, linear: Linear, scheme: Scheme, path: str) -> tuple[Constant, list[Node]]:
    fake = example(linear.weight)
    with fake.fake_mode:
        values = scheme.make_constants(fake, linear.transposed)
    last = gm.graph.find_nodes(op="placeholder")[-1]
    nodes = []
    for name, value in zip(scheme.constants, values, strict=True):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(re.sub(r"\W", "_", f"{path}.{name}".lstrip(".")))
        last.meta["example_value"] = value
        # How Dynamo marks a parameter: its address never changes, so CUDA graphs need no copy of it.
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        last.target = last.name  # one weight read in both layouts asks for the same name twice
        last._dynamo_source = None
        nodes.append(last)
    return Constant(linear.weight.name, scheme, linear.transposed, path, tuple(n.name for n in nodes)), nodes


def _replace(
    gm: GraphModule, linear: Linear, scheme: Scheme, operands: list[Node], quantized: dict[Node, Node]
) -> None:
    graph, node, value = gm.graph, linear.node, example(linear.node)
    with graph.inserting_before(node):
        if linear.input not in quantized:
            quantized[linear.input] = graph.call_function(scheme.quantize, (linear.input,))
            quantized[linear.input].meta = _origin(node)
        new = graph.call_function(scheme.linear, (quantized[linear.input], *operands, linear.bias, value.dtype))
    new.meta = _origin(node) | {"example_value": value}
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _origin(node: Node) -> dict[str, Any]:
    """Where ``node`` comes from: what profilers, tlparse and error messages show of a node that replaces it."""
    return {key: node.meta[key] for key in ("nn_module_stack", "source_fn_stack", "stack_trace") if key in node.meta}


def _erase_unused(node: Node) -> None:
    """Erase a weight, and the transpositions behind it, that nothing reads any more.

    Not ``eliminate_dead_code``: in Dynamo's graph an in-place method whose result is unused counts as dead.
    """
    for user in list(node.users):
        if is_relayout(user):
            _erase_unused(user)
    if not node.users:
        node.graph.erase_node(node)
