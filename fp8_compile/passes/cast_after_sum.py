"""Cast a cumulative sum in a call of its own, so that Inductor cannot forget its dtype.

Inductor replaces the sum of a constant by multiples of it, in int64 whatever dtype the sum was asked for (torch 2.13;
https://github.com/pytorch/pytorch/issues/189518). The offsets of a ``grouped_mm`` are such a sum in NucleusMoE, and it
refuses int64: the model does not compile, in FP8 or not.

Before::

    (1) offs = cumsum(counts, dim=0, dtype=torch.int32)         counts: int64
    (2) y = _grouped_mm(x, w, offs=offs)

After::

    (1) offs = cumsum(counts, dim=0)
    (2) offs = offs.to(torch.int32)
    (3) y = _grouped_mm(x, w, offs=offs)

It leaves alone sums that are no offsets, and those of floating-point numbers. The values are the same: integers are
summed modulo a power of two.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .context import Context
from .graphs import call, example, is_call, substitute
from .linears import find_linears


def cast_after_sum(graph: Graph, context: Context) -> int:
    """Rewrite ``graph``, a copy of Dynamo's, in place; counts the sums."""
    offsets = dict.fromkeys(linear.offs for linear in find_linears(graph) if linear.offs is not None)
    found = [node for node in offsets if _is_sum(node)]
    for node in found:
        rest = {name: value for name, value in node.kwargs.items() if name != "dtype"}
        with graph.inserting_before(node):
            total = call(node, node.target, *node.args, **rest)
        substitute(node, "to", total, node.kwargs["dtype"])
    return len(found)


def _is_sum(node: Node) -> bool:
    """Whether ``node`` sums integers, in a dtype that it names."""
    if not is_call(node, torch.cumsum, "cumsum") or node.kwargs.get("dtype") is None:
        return False
    return not example(node.all_input_nodes[0]).is_floating_point()
