"""Decide, before anything is rewritten, which linears become FP8, which stay, and why.

The graph stays as it is: the plan in the context names its nodes. It counts the linears that become FP8.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from ..patterns import is_adapter, layer_path
from ..schemes import MOST_ROWS, ONES, Call, Scheme
from ..weights import eligible, marks
from ..weights.eligible import Candidate
from ..weights.layers import Layer
from ..weights.quantized_weight import QuantizedWeight
from .context import DEQUANTIZED, Context, Decision, Plan
from .graphs import example, row_count, rows_of_a_sample, storages, subgraphs, written_storages
from .linears import Linear, features_of, find_linears, module_path, other_readers, parameter_path_of, running_path

COMPUTED = "weight is computed at each call, so it cannot be quantized once"


def plan_linears(graph: Graph, context: Context) -> int:
    """Decide on every linear of ``graph``, a copy of Dynamo's; sets ``context.plan``."""
    modified = set().union(*map(written_storages, graph.nodes))
    decisions = []
    for linear in find_linears(graph):
        written = linear.unusual if _is_parameter(linear) else COMPUTED
        if written is None and storages(linear.weight) & modified:
            written = "weight is modified in the graph"
        decisions.append(_decide(linear, written or _other_dtype(linear), context))
    for weight, reader in other_readers(graph, lambda node: _is_eligible(node, context)):
        decisions.append(_unrecognized(weight, reader, context))
    for name, inner in subgraphs(context.module):
        for linear in find_linears(inner.graph):
            decision = _decide(linear, "inside a higher-order operator", context)
            decisions.append(replace(decision, node=f"{name}.{decision.node}", weight=None))
    options = context.options
    static = any(d.call is not None and d.call.takes for d in decisions)
    calibrated = options.calibrated if static else ""
    context.plan = Plan(tuple(decisions), tuple(options.patterns), options.min_features, calibrated)
    return len(context.plan.quantized)


def _is_eligible(node: Node, context: Context) -> bool:
    """Whether the value of a placeholder would become FP8 if a linear read it."""
    weight, layer = example(node), context.layers.get(node.name)
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 2:
        return False
    candidate = Candidate(weight, layer or Layer(), features_of(node))
    return eligible.unfit(candidate, context.options, eligible.scheme_of(candidate.layer, context.options)) is None


def _unrecognized(weight: Node, reader: Node, context: Context) -> Decision:
    """What is said of a matrix that no linear reads."""
    within = layer_path(parameter_path_of(weight))
    layer = context.layers.get(weight.name, Layer((within,)))
    name = getattr(reader.target, "__name__", str(reader.target))
    in_features, out_features = features_of(weight)
    return Decision(
        node=reader.name,
        path=layer.path(within) or within,
        within=within,
        in_features=in_features,
        out_features=out_features,
        weight=weight.name,
        transposed=False,
        decision="unquantized",
        reason=eligible.kept_by_name(layer, context.options) or eligible.read_by(name),
        pattern=eligible.pattern_of(layer, context.options),
        tracked=not layer.adapter,
    )


def _other_dtype(linear: Linear) -> str | None:
    """Eager mode refuses an input of another dtype than the weight; autocast casts both, and gives its own dtype."""
    x, weight, y = (example(node).dtype for node in (linear.input, linear.weight, linear.node))
    if x == weight or (x.is_floating_point and y == weight):
        return None
    given, own = (str(dtype).removeprefix("torch.") for dtype in (x, weight))
    return f"input is {given}, and the weight {own}"


def _decide(linear: Linear, written: str | None, context: Context) -> Decision:
    weight = example(linear.weight)
    within = layer_path(module_path(linear))
    layer = context.layers.get(linear.weight.name) if _is_parameter(linear) else None
    if layer is None:
        layer = Layer((within,), adapter=is_adapter(module_path(linear)))
    options, prequantized = context.options, isinstance(weight, QuantizedWeight)
    scheme = eligible.called(weight, layer, options)
    candidate = Candidate(weight, layer, linear.features, linear.transposed, written)
    by_name = eligible.kept_by_name(layer, options)
    other = eligible.unfit(candidate, options, scheme)
    reason = other if by_name is None else by_name
    call: Call | None = None
    if reason is None:
        call, reason = _call(linear, scheme, context)
    if call is None and prequantized:
        reason = f"{reason}{DEQUANTIZED}"
    in_features, out_features = linear.features
    rows = row_count(example(linear.input).shape)
    # With several schemes, one may take what this one does not.
    named = call is not None or (by_name is not None and other is None) or marks.several(options)
    return Decision(
        node=linear.node.name,
        path=layer.path(layer_path(running_path(linear))) or within,
        within=within,
        in_features=in_features,
        out_features=out_features,
        weight=linear.weight.name if _is_parameter(linear) else None,
        transposed=linear.transposed,
        decision="unquantized" if call is None else "quantized",
        scheme=None if call is None else scheme,
        call=call,
        reason=reason or "",
        pattern=eligible.pattern_of(layer, options),
        rows=None if math.isinf(rows) else int(rows),
        verdict=marks.verdict(layer, options) if named else None,
        experts=linear.experts,
        tracked=not layer.adapter,
    )


def _call(linear: Linear, scheme: Scheme, context: Context) -> tuple[Call | None, str | None]:
    """The first way to run ``linear`` that the device takes, and why it multiplies in high precision if it should not.

    Or None, and why there is none.
    """
    x = example(linear.input)
    reason = refused = None
    rows, experts = rows_of_a_sample(x.shape), linear.experts
    for call in scheme.for_call(rows, x.device) if experts is None else scheme.for_experts(rows, x.device):
        if call.linear is None:
            return None, call.reason
        if experts is not None and call.reason and not isinstance(example(linear.weight), QuantizedWeight):
            return None, call.reason  # all experts' matrices are read, so there is no time to be won by it
        if ONES in call.takes and row_count(x.shape) > MOST_ROWS:
            reason = f"more than {MOST_ROWS} rows"
            refused = refused or reason
            continue
        if call.quantize is not None:  # of a weight that is quantized already, nobody has asked before
            in_features, out_features = linear.features
            reason = scheme.reason(out_features, in_features, example(linear.weight).dtype)
            if reason is not None:
                refused = refused or reason
                continue
        if context.refusal is None or scheme.input_scale_missing:  # an error, when all layers of its kind are known
            return call, None if call.quantize else refused or call.reason or None
        bias = linear.bias is not None
        size = math.prod(x.shape[:-1])
        reason = context.refusal(scheme, call, x.device, size, linear.features, x.dtype, bias, experts)
        if reason is None:
            return call, None if call.quantize else refused or call.reason or None
        refused = refused or reason
    return None, reason


def _is_parameter(linear: Linear) -> bool:
    return linear.weight.op == "placeholder" and isinstance(example(linear.weight), torch.nn.Parameter)
