"""Attentions in a graph: in which forms they come, and what each is given."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .graphs import aten_name


@dataclass(frozen=True)
class Attention:
    """One call of ``scaled_dot_product_attention``.

    Attributes:
        node: that computes it.
        query, key, value: nodes, ``[..., heads, tokens, head size]``.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as in ``torch.nn.functional``; numbers, or nodes.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SIGNATURE = inspect.Signature(
    [
        *(inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in _NAMES[:3]),
        *(
            inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
            for n, default in zip(_NAMES[3:6], (None, 0.0, False), strict=True)
        ),
        inspect.Parameter("scale", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("enable_gqa", inspect.Parameter.KEYWORD_ONLY, default=False),
    ]
)


def as_attention(node: Node) -> Attention | None:
    """The attention that ``node`` computes, or None.

    Known are ``torch.nn.functional.scaled_dot_product_attention`` and the aten operator of that name.
    """
    function = torch.nn.functional.scaled_dot_product_attention
    if node.op != "call_function" or not (node.target is function or aten_name(node) == "scaled_dot_product_attention"):
        return None
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    return Attention(node, **bound.arguments)
