"""What the passes of one compilation share: what was asked for, the plan, the constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.fx import GraphModule

from ..attention.kernel import Kernel
from ..options import RECOMMENDED, Fp8Options
from ..schemes import Call, Scheme
from ..weights.layers import Layer


@dataclass(frozen=True)
class Decision:
    """What becomes of one linear.

    Attributes:
        node: name of the node that computes it, in Dynamo's graph.
        path: of its module in the outermost module that was running; in the graph's own region if the weight is no
            parameter.
        within: the same path in the graph's own region.
        rows: of the activation when the graph was compiled; None if unknown. A dynamic graph may see others.
        weight: name of the placeholder that holds its weight, or None if that is no parameter.
        transposed: the weight is stored ``[in_features, out_features]``.
        decision: "quantized" or "unquantized".
        scheme: of its weight; None if it is unquantized.
        call: how it runs; None if it is unquantized.
        reason: why it is unquantized; empty for "quantized".
        pattern: the entry of ``ignored_layers``, or of ``layers``, that lets it stay, or None.
        verdict: what was decided because of which layer it is (`fp8_compile.weights.marks`); None if another layer, of
            whichever name, would run just the same.
        experts: how many matrices its weight is a stack of; None if that is one matrix.
        tracked: whether the report follows the weight. Adapters' weights are swapped and resized by their owners,
            which a weak reference to them would forbid (``torch.utils.swap_tensors``).
    """

    node: str
    path: str
    within: str
    in_features: int
    out_features: int
    weight: str | None
    transposed: bool
    decision: Literal["quantized", "unquantized"]
    scheme: Scheme | None = None
    call: Call | None = None
    reason: str = ""
    pattern: str | None = None
    rows: int | None = None
    verdict: str | None = None
    experts: int | None = None
    tracked: bool = True

    @property
    def needs_scale(self) -> bool:
        """Whether its constants cannot be made for want of an input scale."""
        return self.scheme is not None and self.scheme.input_scale_missing


@dataclass(frozen=True)
class AttentionDecision:
    """What becomes of one attention.

    It has no parameter to be known by. A linear that feeds it has, below the same module: who names that, names this.

    Attributes:
        node: name of the node that computes it, in Dynamo's graph.
        path: of its module in the outermost module that was running, and `fp8_compile.weights.layers.SDPA`.
        within: the same path in the graph's own region.
        weight: name of the placeholder that holds the weight of that linear; None if none feeds it.
        above: how many segments of the linear's path are not of the module that both are in.
        queries, keys: tokens when the graph was compiled; None if unknown.
        heads, key_heads, head_size: of the queries, of keys and values; None if unknown.
        kernel: what computes it; None: it stays as it was written.
        reason: why it stays, or why no faster kernel computes it.
        pattern, verdict: as in `Decision`.
    """

    node: str
    path: str
    within: str
    weight: str | None
    above: int
    queries: int | None
    keys: int | None
    heads: int | None
    key_heads: int | None
    head_size: int | None
    kernel: str | None = None
    reason: str = ""
    pattern: str | None = None
    verdict: str | None = None


DEQUANTIZED = "; its quantized weight is dequantized"
"""What a reason says besides of a weight that is quantized already."""


@dataclass(frozen=True)
class Plan:
    """The decisions on all linears of one graph, in its order.

    Attributes:
        patterns: all entries that name layers, of whichever option.
        calibrated: where static input scales come from; empty if there are none.
        attentions: what `quantize_attention` decided on each attention; empty if it was not asked to.
    """

    decisions: tuple[Decision, ...]
    patterns: tuple[str, ...]
    min_features: int = Fp8Options.min_features
    calibrated: str = ""
    attentions: tuple[AttentionDecision, ...] = ()

    @property
    def quantized(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.decision == "quantized")

    @property
    def unmatched_patterns(self) -> tuple[str, ...]:
        # What "recommended" stands for depends on the layer, so none bears its name.
        matched = {RECOMMENDED, *(d.pattern for d in self.decisions), *(a.pattern for a in self.attentions)}
        return tuple(p for p in self.patterns if p not in matched)

    def reasons(self) -> Counter[str]:
        """How many linears stay unquantized for each reason."""
        return Counter(d.reason for d in self.decisions if d.decision == "unquantized")


@dataclass(frozen=True)
class Constants:
    """Constants that a rewritten graph needs of one parameter.

    Attributes:
        weight: name of the parameter's placeholder in the original graph.
        scheme: what makes them.
        transposed: the parameter is stored ``[K, N]``, or ``[E, K, N]``.
        placeholders: their names in the rewritten graph, in the order of ``scheme.specs``.
        prequantized: the parameter is a `QuantizedWeight`, and the constants are the tensors in it. The placeholders of
            these come before those of the others.
    """

    weight: str
    scheme: Scheme
    transposed: bool
    placeholders: tuple[str, ...]
    prequantized: bool = False


Refusal = Callable[
    [Scheme, Call, torch.device, int | torch.SymInt, tuple[int, int], torch.dtype, bool, int | None], str | None
]
"""Why a device cannot run a call on so many rows and features of a dtype, with a bias or without, and of so many
experts, if any; or None."""


@dataclass
class PassResult:
    """What a pass did to one graph.

    Attributes:
        matches: how many places it found; None if it did not run.
        milliseconds: that it took.
        note: why it did not run.
    """

    name: str
    matches: int | None = None
    milliseconds: float = 0.0
    note: str = ""


@dataclass
class Context:
    """What the passes of one compilation share.

    Attributes:
        module: Dynamo's own graph module, whose subgraphs the copy refers to by name.
        options: as the user gave them.
        refusal: asked of each linear that is to become FP8; None where there is no device to ask.
        layers: which layers the parameters are the weights of, by placeholder.
        plan: what `plan_linears` decided, and `quantize_attention`.
        constants: what `quantize_linears` needs, in the order in which the graph takes them.
        ones: devices of the `ONES` that the graph takes after them.
        together: pairs of weights, by placeholder, whose linears read one quantized activation: their layers must have
            the same input scale.
        attention_kernels: what computes attention in the rewritten graph.
        results: what each pass did, in their order.
    """

    module: GraphModule
    options: Fp8Options
    refusal: Refusal | None = None
    layers: Mapping[str, Layer] = field(default_factory=dict)
    plan: Plan = Plan((), ())
    constants: list[Constants] = field(default_factory=list)
    ones: list[torch.device] = field(default_factory=list)
    together: set[tuple[str, str]] = field(default_factory=set)
    attention_kernels: tuple[Kernel, ...] = ()
    results: list[PassResult] = field(default_factory=list)
