"""Compute GELU's approximation with a sigmoid instead of a hyperbolic tangent.

``0.5 * x * (1 + tanh(u))`` is ``x * sigmoid(2 * u)``. As a tangent, Inductor's code spends more instructions on it than
on all of the quantization that follows, and a kernel that does both is bound by them, not by memory. It is also the
less exact form: where the tangent comes close to -1, the sum cancels.

Before::

    (1) y = gelu(x, approximate="tanh")         x: bfloat16 or float16

After::

    (1) y = gelu_by_sigmoid(x)                  in float32, with one cast at the end

It leaves alone the exact GELU and other dtypes. It does not run for other compilers than Inductor, which may make a
kernel of each of these operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import numerics
from .context import Context
from .graphs import example, is_call, substitute

_DTYPES = (torch.bfloat16, torch.float16)


def sigmoid_gelu(graph: Graph, context: Context) -> int:
    """Rewrite ``graph``, a copy of Dynamo's, in place; counts the GELUs."""
    found = 0
    for node in list(graph.nodes):
        if not _is_tanh_gelu(node):
            continue
        substitute(node, numerics.gelu_by_sigmoid, node.args[0] if node.args else node.kwargs["input"])
        found += 1
    return found


def _is_tanh_gelu(node: Node) -> bool:
    value: Any = example(node)
    return (
        is_call(node, torch.nn.functional.gelu, "gelu")
        and node.kwargs.get("approximate") == "tanh"
        and set(node.kwargs) <= {"approximate", "input"}  # not "out"
        and isinstance(value, Tensor)
        and value.dtype in _DTYPES
    )
