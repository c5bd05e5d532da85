"""Decide, before anything is rewritten, which linears become FP8, which stay, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.fx import GraphModule

from ..options import Fp8Options
from ..patterns import first_match, is_adapter, layer_path
from ..schemes.fp8 import Scheme, scheme_of, weight_only
from ..weights.quantized_weight import Fp8Weight
from .graphs import example, row_count, storages, written_storages
from .linears import Linear, find_linears, module_path


@dataclass(frozen=True)
class Decision:
    """What becomes of one linear.

    Attributes:
        node: name of the node that computes it, in Dynamo's graph.
        path: of its module, relative to the compiled region.
        weight: name of the placeholder that holds its weight, or None if that is no parameter.
        transposed: the weight is stored ``[in_features, out_features]``.
        decision: "fp8" or "kept".
        scheme: how it becomes FP8; None if it is kept.
        reason: why it is kept; empty for "fp8".
        pattern: the entry of ``ignored_layers`` that names it, or None.
        tracked: whether the report follows the weight. Adapters' weights are swapped and resized by their owners,
            which a weak reference to them would forbid (``torch.utils.swap_tensors``).
    """

    node: str
    path: str
    in_features: int
    out_features: int
    weight: str | None
    transposed: bool
    decision: Literal["fp8", "kept"]
    scheme: Scheme | None = None
    reason: str = ""
    pattern: str | None = None
    tracked: bool = True


@dataclass(frozen=True)
class Plan:
    """The decisions on all linears of one graph, in its order."""

    decisions: tuple[Decision, ...]
    ignored_layers: tuple[str, ...]

    @property
    def converted(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.decision == "fp8")

    @property
    def unmatched_patterns(self) -> tuple[str, ...]:
        matched = {d.pattern for d in self.decisions}
        return tuple(p for p in self.ignored_layers if p not in matched)

    def reasons(self) -> Counter[str]:
        """How many linears are kept for each reason."""
        return Counter(d.reason for d in self.decisions if d.decision == "kept")


Refusal = Callable[[Scheme, torch.device, int | torch.SymInt, tuple[int, int], torch.dtype, bool], str | None]
"""Why a device cannot run a scheme on so many rows and features of a dtype, with a bias or without, or None."""


def plan_linears(
    gm: GraphModule,
    options: Fp8Options,
    scheme: Scheme,
    refusal: Refusal | None = None,
    kept_at_load: Mapping[str, str] | None = None,
) -> Plan:
    """Decide on every linear of Dynamo's graph ``gm``; the graph stays as it is.

    Args:
        scheme: for weights that are not in FP8 yet.
        refusal: asked of each linear that is to become FP8; None where there is no device to ask.
        kept_at_load: placeholders of weights that `quantize_` left as they were, and its reasons.
    """
    kept_at_load = kept_at_load or {}
    written = set().union(*map(written_storages, gm.graph.nodes))
    decisions = []
    for linear in find_linears(gm.graph):
        kept = kept_at_load.get(linear.weight.name)
        choice = _choose(linear, options, scheme) if kept is None else kept
        if isinstance(choice, Scheme) and storages(linear.weight) & written:
            choice = "weight is modified in the graph"
        decision = _decision(linear, options, choice)
        if decision.scheme is not None and refusal is not None:
            decision = _decision(linear, options, _unless_refused(linear, decision.scheme, refusal))
        if decision.scheme is None and isinstance(example(linear.weight), Fp8Weight):
            decision = replace(decision, reason=f"{decision.reason}; its FP8 weight is dequantized")
        decisions.append(decision)
    for name, linear in _inside_higher_order_operators(gm):
        decision = _decision(linear, options, "inside a higher-order operator")
        decisions.append(replace(decision, node=f"{name}.{decision.node}", weight=None))
    return Plan(tuple(decisions), options.ignored_layers)


def _unless_refused(linear: Linear, scheme: Scheme, refusal: Refusal) -> Scheme | str:
    x = example(linear.input)
    bias = linear.bias is not None
    why = refusal(scheme, x.device, math.prod(x.shape[:-1]), linear.features, x.dtype, bias)
    if why is None:
        return scheme
    return why if scheme.fallback is None else _unless_refused(linear, scheme.fallback, refusal)


def _inside_higher_order_operators(gm: GraphModule, prefix: str = "") -> Iterator[tuple[str, Linear]]:
    for node in gm.graph.find_nodes(op="get_attr"):  # Dynamo leaves behind subgraphs that nothing refers to
        inner = getattr(gm, str(node.target), None)
        if isinstance(inner, GraphModule):
            name = f"{prefix}{node.target}"
            yield from ((name, linear) for linear in find_linears(inner.graph))
            yield from _inside_higher_order_operators(inner, f"{name}.")


def _decision(linear: Linear, options: Fp8Options, choice: Scheme | str) -> Decision:
    module = module_path(linear)
    path = layer_path(module)
    pattern = None if is_adapter(module) else first_match(options.ignored_layers, path)
    if pattern is not None:
        choice = f"ignored_layers: {pattern}"
    in_features, out_features = linear.features
    return Decision(
        node=linear.node.name,
        path=path,
        in_features=in_features,
        out_features=out_features,
        weight=linear.weight.name if _is_parameter(linear) else None,
        transposed=linear.transposed,
        decision="kept" if isinstance(choice, str) else "fp8",
        scheme=None if isinstance(choice, str) else choice,
        reason=choice if isinstance(choice, str) else "",
        pattern=pattern,
        tracked=not is_adapter(module),
    )


def _is_parameter(linear: Linear) -> bool:
    return linear.weight.op == "placeholder" and isinstance(example(linear.weight), torch.nn.Parameter)


def _choose(linear: Linear, options: Fp8Options, scheme: Scheme) -> Scheme | str:
    """The scheme for ``linear``, or the reason to keep it."""
    if is_adapter(module_path(linear)):
        return "low-rank adapter"
    if not _is_parameter(linear):
        return "weight is not a parameter"
    weight = example(linear.weight)
    if linear.unusual:
        return linear.unusual
    rows = row_count(example(linear.input).shape)
    if isinstance(weight, Fp8Weight):
        return _choose_for_fp8(linear, weight, rows, options)
    objection = weight_objection(weight, linear.features, options)
    if objection is not None:
        return objection
    if rows == math.inf:
        return _UNKNOWN_ROWS
    chosen = scheme if rows >= options.min_rows else scheme.few_rows
    if chosen is None:
        return f"fewer rows than min_rows {options.min_rows}"
    return chosen.refuses(*linear.features, weight.dtype) or chosen


_UNKNOWN_ROWS = "number of rows is known only at run time"  # the meta function of _scaled_mm compares it


def weight_objection(weight: torch.Tensor, features: tuple[int, int], options: Fp8Options) -> str | None:
    """Why ``weight``, of a linear with these input and output features, is not to become FP8, or None."""
    if _subclass(weight) is not None:
        return f"weight is a {_subclass(weight)}"
    return dtype_objection(weight) or (
        f"narrower than min_features {options.min_features}" if min(features) < options.min_features else None
    )


def dtype_objection(weight: torch.Tensor) -> str | None:
    """Why a weight of this dtype is not to become FP8, or None."""
    if weight.dtype in (torch.bfloat16, torch.float16):
        return None
    return f"weight is {str(weight.dtype).removeprefix('torch.')}, not bfloat16 or float16"


def _choose_for_fp8(linear: Linear, weight: Fp8Weight, rows: float, options: Fp8Options) -> Scheme | str:
    """How to multiply by a weight that is in FP8 already: whether it becomes FP8 is no question here."""
    if linear.transposed:
        return "used with its features exchanged"  # its scales belong to what are input features here
    objection = dtype_objection(weight)
    if objection is not None:
        return objection
    if rows == math.inf:
        return _UNKNOWN_ROWS
    scheme = scheme_of(weight.granularity)
    min_rows = options.min_rows if weight.min_rows is None else weight.min_rows
    if rows >= min_rows:
        return scheme.refuses(*linear.features, weight.dtype) or scheme
    return weight_only(scheme) if options.few_rows == "weight-only" else f"fewer rows than min_rows {min_rows}"


def _subclass(weight: torch.Tensor) -> str | None:
    """The class of a weight that is a tensor subclass, seen through the fake tensor that stands for a plain one."""
    from torch._subclasses.fake_tensor import FakeTensor

    plain = (torch.Tensor, torch.nn.Parameter, FakeTensor)
    return None if type(weight) in plain else type(weight).__name__
