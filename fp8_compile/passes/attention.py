"""Attentions in a graph: in which forms they come, and what each is given."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .graphs import aten_name, example, is_call


@dataclass(frozen=True)
class Attention:
    """One call of ``scaled_dot_product_attention``, or of what computes the same.

    Attributes:
        node: that computes it.
        result: what the attention itself is read from: ``node``, or the first of several results.
        query, key, value: nodes, ``[..., heads, tokens, head size]``.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as in ``torch.nn.functional``; numbers, or nodes.
        unusual: why it is more than these say, or None.
    """

    node: Node
    result: Node
    query: Node
    key: Node
    value: Node
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    unusual: str | None = None


_KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""Operators of aten that ``scaled_dot_product_attention`` may become; each gives its result first, then others."""


def as_attention(node: Node, module: GraphModule) -> Attention | None:
    """The attention that ``node`` computes, or None.

    Known are ``torch.nn.functional.scaled_dot_product_attention`` and the aten operator of that name, the aten
    operators of its kernels, and ``flex_attention``. Of operators that seem to compute attention in another way it says
    so: theirs are `Attention.unusual`.

    Args:
        module: whose graph, or a copy of it, ``node`` is in; it holds what ``flex_attention`` does to the scores.
    """
    if node.op != "call_function":
        return None
    function = torch.nn.functional.scaled_dot_product_attention
    if node.target is function or aten_name(node) == "scaled_dot_product_attention":
        given = _arguments_of(node, torch.ops.aten.scaled_dot_product_attention.default._schema)
        return Attention(node, node, **given)
    if node.target is torch.ops.higher_order.flex_attention:
        return _of_flex(node, module)
    if aten_name(node) in _KERNELS:
        return _of_kernel(node)
    return _of_other(node)


def _arguments_of(node: Node, schema: Any) -> dict[str, Any]:
    """What ``node`` gives an operator, or a function with its arguments, by name, with the defaults."""
    given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    return {**given, **{a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}, **node.kwargs}


def _of_kernel(node: Node) -> Attention | None:
    target: Any = node.target
    schema = (target.default if isinstance(target, torch._ops.OpOverloadPacket) else target)._schema
    if schema.overload_name:  # "quantized"
        return None
    given = _arguments_of(node, schema)
    given["attn_mask"] = given.pop("attn_bias", given.get("attn_mask"))
    result, unusual = _first_result(node)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    return Attention(node, result, **{name: given[name] for name in names}, unusual=unusual)


def _of_flex(node: Node, module: GraphModule) -> Attention:
    query, key, value, score_mod, block_mask, scale = node.args[:6]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    result, unusual = _first_result(node)
    assert isinstance(block_mask, tuple)
    if unusual is None and not _gives_back_its_score(_subgraph(module, score_mod)):
        unusual = "score_mod changes the scores"
    masks = not _is_always_true(_subgraph(module, block_mask[-1]))
    return Attention(
        node, result, query, key, value, attn_mask=block_mask if masks else None, scale=scale, unusual=unusual
    )


def _of_other(node: Node) -> Attention | None:
    """Operators of libraries, such as ``flash_attn::_flash_attn_forward``, by their names."""
    target: Any = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    name = packet._qualified_op_name
    words = name.partition("::")[2].split("_")
    operands = [x for x in node.args[:3] if isinstance(x, Node) and isinstance(example(x), torch.Tensor)]
    if not {"attention", "attn"} & set(words) or {"backward", "bwd"} & set(words) or len(operands) < 3:
        return None
    lengths = [argument.name for argument in _arguments(packet) if argument.name.startswith(("cu_seq", "cum_seq"))]
    query, key, value = operands
    unusual = f"computed by {name}{', for sequences of various lengths' if lengths else ''}"
    return Attention(node, node, query, key, value, unusual=unusual)


def _arguments(packet: torch._ops.OpOverloadPacket) -> list[Any]:
    """The arguments of an operator's first overload."""
    overload: Any = getattr(packet, packet.overloads()[0])  # type: ignore[no-untyped-call]
    return list(overload._schema.arguments)


def _first_result(node: Node) -> tuple[Node, str | None]:
    """The node that takes the first of several results; and what is wrong if others are read, too."""
    read = [user for user in node.users if is_call(user, operator.getitem, "__getitem__") and user.args[1] == 0]
    if len(read) != 1 or len(node.users) > 1:
        return node, "its log-sum-exp is read, too, as ring attention does"
    return read[0], None


def _subgraph(module: GraphModule, node: Any) -> Any:
    """The graph behind ``node``, a ``get_attr``; None if there is none."""
    inner = getattr(module, str(node.target), None) if isinstance(node, Node) else None
    return inner.graph if isinstance(inner, GraphModule) else None


def _gives_back_its_score(graph: Any) -> bool:
    if graph is None:
        return False
    return graph.output_node().args[0] is next(iter(graph.nodes))


def _is_always_true(graph: Any) -> bool:
    if graph is None:
        return False
    value = graph.output_node().args[0]
    return isinstance(value, Node) and is_call(value, None, "new_ones")
