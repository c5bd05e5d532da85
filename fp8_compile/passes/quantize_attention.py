"""Compute attention in FP8 (option ``attention``).

Before::

    (1) y = scaled_dot_product_attention(q, k, v)

After, with one of the functions of `fp8_compile.attention`::

    (1) y = attention_flash3(q, k, v, None, torch.bfloat16)

It takes each form that `as_attention` knows, and leaves alone, with a reason for the report: what has a mask, is causal
or drops out; operands of other dtypes than bfloat16 and float16, or of other than four dimensions; a scale that is
known only at run time; a result that is more than the attention; what no kernel of the device takes; and what the
options keep by its name.

Nothing in a graph tells the attention of one block from that of another, which the same graph serves, as the weights of
linears do. So an attention bears the name of the module that it has in common with a linear that feeds it, and the
graph is guarded on what options say of that name (`fp8_compile.weights.marks`). Where no linear feeds it, it stays if
the options name layers at all.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..attention import choose
from ..attention.kernel import Kernel, Question
from ..patterns import join, layer_path
from ..weights import eligible, marks
from ..weights.eligible import QUANTIZABLE_DTYPES
from ..weights.layers import SDPA, Layer
from .attention import Attention, as_attention
from .context import AttentionDecision, Context, Decision
from .graphs import call, example, size_hint, subgraphs
from .linears import module_of_node


def quantize_attention(graph: Graph, context: Context) -> int:
    """Rewrite ``graph``, a copy of Dynamo's, in place; adds to ``context.plan``. Counts the attentions in FP8."""
    if not context.options.fp8_attention:
        return 0
    linears = {d.node: d for d in context.plan.decisions if d.weight is not None and d.tracked}
    decisions, chosen = [], []
    for node in list(graph.nodes):
        attention = as_attention(node, context.module)
        if attention is None:
            continue
        decision, kernel = _decide(attention, linears, context)
        decisions.append(decision)
        if kernel is not None:
            chosen.append(kernel)
            _replace(attention, kernel)
    for name, inner in subgraphs(context.module):
        for node in inner.graph.nodes:
            attention = as_attention(node, inner)
            if attention is not None:
                decision, _ = _decide(attention, {}, context, "inside a higher-order operator")
                decisions.append(replace(decision, node=f"{name}.{decision.node}"))
    context.plan = replace(context.plan, attentions=tuple(decisions))
    context.attention_kernels = tuple(dict.fromkeys(chosen))
    return len(chosen)


def _replace(attention: Attention, kernel: Kernel) -> None:
    result = attention.result
    operands = attention.query, attention.key, attention.value
    with result.graph.inserting_before(result):
        new = call(attention.node, kernel.attention, *operands, attention.scale, example(result).dtype)
    new.meta["example_value"] = example(result)
    result.replace_all_uses_with(new)
    for node in dict.fromkeys((result, attention.node)):
        result.graph.erase_node(node)


def _decide(
    attention: Attention, linears: dict[str, Decision], context: Context, unusual: str | None = None
) -> tuple[AttentionDecision, Kernel | None]:
    options = context.options
    within, linear, above = _place(attention, linears)
    layer = Layer()
    if linear is not None:
        assert linear.weight is not None
        layer = context.layers.get(linear.weight, Layer((linear.within,))).attention(above)
    by_name = eligible.kept_by_name(layer, options)
    kernel, reason = None, unusual or _unfit(attention)
    if reason is None:
        kernel, reason = choose(options.attention, _question(attention, options.inner_backend == "inductor"))
    named = bool(options.patterns) and linear is not None and kernel is not None
    if by_name is not None:
        kernel, reason = None, by_name
    shapes = [[_known(size) for size in _shape(x)] for x in (attention.query, attention.key)]
    (_, heads, queries, size), (_, key_heads, keys, _) = shapes
    return AttentionDecision(
        node=attention.node.name,
        path=layer.path(within) or within,
        within=within,
        weight=None if linear is None else linear.weight,
        above=above,
        queries=queries,
        keys=keys,
        heads=heads,
        key_heads=key_heads,
        head_size=size,
        kernel=None if kernel is None else kernel.name,
        reason=reason,
        pattern=eligible.pattern_of(layer, options),
        verdict=marks.attention_verdict(layer, options) if named else None,
    ), kernel


def _shape(node: Node) -> list[Any]:
    """Four sizes, None for those that there are not."""
    value: Any = example(node)
    return [*([None] * (4 - value.dim())), *value.shape][-4:]


def _known(size: Any) -> int | None:
    hint = None if size is None else size_hint(size)
    return hint if isinstance(hint, int) else None


def _unfit(attention: Attention) -> str | None:
    """Why no kernel is asked, or None."""
    if attention.unusual is not None:
        return attention.unusual
    if attention.attn_mask is not None:
        return "has a mask"
    if attention.is_causal is not False:
        return "is causal"
    if attention.dropout_p != 0.0:
        return "drops out"
    if not (attention.scale is None or isinstance(attention.scale, (int, float))):
        return "its scale is known only at run time"
    q, k, v = (example(node) for node in (attention.query, attention.key, attention.value))
    if not q.dtype == k.dtype == v.dtype or q.dtype not in QUANTIZABLE_DTYPES:
        given = ", ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in (q, k, v)))
        return f"its operands are {given}, not bfloat16 or float16"
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"its operands have {q.dim()} dimensions, not 4"
    if not (_same(q.shape[0], k.shape[0]) and _same(k.shape[0], v.shape[0])):
        return "its operands differ in their batch"
    if not (isinstance(q.shape[1], int) and isinstance(k.shape[1], int) and k.shape[1] == v.shape[1]):
        return "its numbers of heads are known only at run time"
    if q.shape[1] % k.shape[1]:
        return "keys have more heads than queries"
    return None


def _same(one: Any, other: Any) -> bool:
    return size_hint(one) == size_hint(other)


def _question(attention: Attention, inductor: bool) -> Question:
    query: Tensor = example(attention.query)
    cuda = query.device.type == "cuda"
    capability = torch.cuda.get_device_capability(query.device) if cuda else None
    return Question(query.device, capability, query.shape[-1], example(attention.value).shape[-1], inductor)


def _place(attention: Attention, linears: dict[str, Decision]) -> tuple[str, Decision | None, int]:
    """The attention's path in the region; the linear by which it is named, and how far that is below its module."""
    running = layer_path(module_of_node(attention.node)).split(".")
    best: tuple[int, str, Decision] | None = None
    for linear in _feeding(attention, linears):
        segments = linear.within.split(".")
        common = [a for a, _ in itertools.takewhile(lambda ab: ab[0] == ab[1], zip(running, segments, strict=False))]
        above = len(segments) - len(common)
        if 1 <= above <= marks.MOST_ABOVE and (best is None or above < best[0]):
            best = above, join(".".join(common), SDPA), linear
    if best is None:
        return join(".".join(running), SDPA), None, 0
    return best[1], best[2], best[0]


def _feeding(attention: Attention, linears: dict[str, Decision]) -> Iterator[Decision]:
    """The nearest linears before the operands, those of the query first."""
    waiting = deque((attention.query, attention.key, attention.value))
    seen: set[Node] = set()
    while waiting:
        node = waiting.popleft()
        if node in seen:
            continue
        seen.add(node)
        if node.name in linears:
            yield linears[node.name]
        else:
            waiting.extend(node.all_input_nodes)
