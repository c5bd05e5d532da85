"""Compute attention in float32 on a CPU that has no instructions for bfloat16 (option ``cpu_attention="float32"``).

There every product of bfloat16 matrices is emulated; see `numerics.products_dtype`. The result is rounded to the dtype
that it had; what is in between is more exact than before, and takes twice the memory.

Before::

    (1) y = scaled_dot_product_attention(q, k, v)

After::

    (1) y = attention_in_float32(q, k, v, None, 0.0, False, None, False, torch.bfloat16)

It leaves alone what is in float32 already or on a GPU, and everything unless the option asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .. import numerics
from .attention import as_attention
from .context import Context
from .graphs import example, substitute


def float32_attention(graph: Graph, context: Context) -> int:
    """Rewrite ``graph``, a copy of Dynamo's, in place; counts the attentions."""
    if context.options.cpu_attention != "float32":
        return 0
    found = 0
    for node in list(graph.nodes):
        attention = as_attention(node, context.module)
        # Of several results, a CPU's kernel among them, no more than the first would be had.
        if attention is None or attention.result is not node or attention.unusual or not _half_on_cpu(node):
            continue
        operands = attention.query, attention.key, attention.value, attention.attn_mask
        how = attention.dropout_p, attention.is_causal, attention.scale, attention.enable_gqa
        substitute(node, numerics.attention_in_float32, *operands, *how, example(node).dtype)
        found += 1
    return found


def _half_on_cpu(node: Node) -> bool:
    value: Any = example(node)
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype in (torch.bfloat16, torch.float16)
