"""Let all matmuls that read one quantized activation read the same tensor in memory.

Inductor gives an operator the exact strides that it saw in eager mode. It does so by a copy for each reader, even
where the strides agree: q, k and v cost three FP8 tensors, each written and read. It takes those strides from
``meta["eager_input_vals"]``, where None asks for nothing. Without any request, however, it may lay the tensor out like
the tensor it was computed from, which no kernel accepts after a transposition; so the layout is fixed once, where the
tensor is made.

Before::

    (1) q = convert_element_type(..., float8_e4m3fn)
    (2) a = _scaled_mm(view(q), ...)                     meta: the eager strides of all operands
    (3) b = _scaled_mm(view_1(q), ...)                   -> Inductor writes q twice

After::

    (1) q = convert_element_type(..., float8_e4m3fn)
    (2) f = inductor_force_stride_order(q, (2, 1))
    (3) a = _scaled_mm(view(f), ...)                     meta: those of all operands but the first
    (4) b = _scaled_mm(view_1(f), ...)                   -> Inductor writes q once

The same is done for the matmul of `block_scales`, and there for the scales of the activation, which are its second
operand. It leaves alone every other operator, and an operand that is no contiguous tensor.
"""

from __future__ import annotations

import torch
from torch._inductor import inductor_prims  # registers the operator that this pass inserts
from torch.fx import Graph, Node

from ..block_scales import MATMUL
from .context import Context
from .graphs import VIEWS

# Where the quantized activation stands among their operands; with blocks, its scales are a tensor of some size, too.
_MATMULS = {torch.ops.aten._scaled_mm.default: (0,), MATMUL: (0, 1)}
_FORCE = inductor_prims.force_stride_order


def one_fp8_copy(graph: Graph, context: Context) -> int:
    """Edit ``graph``, a graph of aten operators after AOTAutograd, in place; counts the matmuls freed of their copy."""
    freed = 0
    for matmul, operands in _MATMULS.items():
        for node in graph.find_nodes(op="call_function", target=matmul):
            args, kwargs = node.meta.get("eager_input_vals", ((), {}))
            asked = [i for i in operands if i < len(args) and args[i] is not None]
            made = {i: maker for i in asked if (maker := _maker(node.args[i])) is not None}
            for maker in made.values():
                _fix_layout(graph, maker)
            if made:
                node.meta["eager_input_vals"] = tuple(None if i in made else a for i, a in enumerate(args)), kwargs
                freed += 1
    return freed


def _maker(operand: object) -> Node | None:
    """The node that computes ``operand``, views passed over, if all of them are contiguous."""
    while isinstance(operand, Node) and _contiguous(operand):
        if operand.target not in VIEWS:
            return operand
        operand = operand.args[0]
    return None


def _contiguous(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_contiguous()


def _fix_layout(graph: Graph, node: Node) -> None:
    if node.target is _FORCE or node.op == "placeholder":
        return
    # Only the order of the strides counts, so their values, which may be symbolic, can stay out of the graph.
    order = tuple(range(node.meta["val"].dim(), 0, -1))
    with graph.inserting_after(node):
        forced = graph.call_function(_FORCE, (node, order))
    forced.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(forced, delete_user_cb=lambda user: user is not forced)
