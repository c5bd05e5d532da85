"""The order of the passes, and the trace that each leaves.

All have one signature: ``(graph, context)`` to the number of places that they changed. `PASSES` is read from top to
bottom; the reason why a pass stands where it stands is beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.fx import Graph, GraphModule

from . import spec
from .cast_after_sum import cast_after_sum
from .context import Context, PassResult
from .e4m3_on_cpu import e4m3_on_cpu
from .float32_attention import float32_attention
from .graphs import copy_graph, module_of
from .one_fp8_copy import one_fp8_copy
from .plan import plan_linears
from .quantize_attention import quantize_attention
from .quantize_linears import quantize_linears
from .real_rotary import real_rotary
from .rotary_pairs import rotary_pairs
from .sigmoid_gelu import sigmoid_gelu

Stage = Literal["dynamo", "post_grad"]
"""Which graph a pass takes: a copy of Dynamo's, or that after AOTAutograd, inside Inductor
(``post_grad_custom_post_pass``)."""


@dataclass(frozen=True)
class Pass:
    """A pass and its place.

    Attributes:
        reason: for its place in the order.
        optional: whether ``disabled_passes`` may name it.
        fuses: it makes several operators of one, for a compiler that fuses them, or goes around an error of Inductor's;
            others do without it.
    """

    run: Callable[[Graph, Context], int]
    stage: Stage
    reason: str
    optional: bool = True
    fuses: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


PASSES = (
    Pass(plan_linears, "dynamo", "first: it names nodes of the graph as the user wrote it", optional=False),
    Pass(
        quantize_attention,
        "dynamo",
        "asks which linears of the plan feed an attention; float32_attention takes what it leaves",
        optional=False,
    ),
    Pass(real_rotary, "dynamo", "touches no linear, and no pass touches rotations"),
    Pass(rotary_pairs, "dynamo", "the same, for other spellings"),
    Pass(float32_attention, "dynamo", "runs only where an option asks for it; no other pass touches attention"),
    Pass(sigmoid_gelu, "dynamo", "Inductor decomposes GELU before its own passes; no pass knows it", fuses=True),
    Pass(cast_after_sum, "dynamo", "as sigmoid_gelu; touches offsets only", optional=False, fuses=True),
    Pass(quantize_linears, "dynamo", "carries out the plan, which no earlier pass may outdate", optional=False),
    Pass(e4m3_on_cpu, "post_grad", "touches CPUs only, and the next one GPUs only", fuses=True),
    Pass(one_fp8_copy, "post_grad", "last: earlier passes of Inductor's read the metadata that it takes away"),
)

HEURISTICS = ("whole_rows",)
"""What could be a pass, but is done by steering Inductor: see `fp8_compile.inductor`."""

DISABLEABLE = (*(p.name for p in PASSES if p.optional), *HEURISTICS)
"""What ``disabled_passes`` may name."""

Trace = Callable[[str, Callable[[], GraphModule]], None]
"""Receives a stage's name, and what makes the graph at that stage."""


def rewrite(context: Context, trace: Trace) -> GraphModule:
    """Run the passes on a copy of Dynamo's graph, ``context.module``.

    Returns:
        The rewritten graph, which takes ``context.constants`` as further inputs.
    """
    gm = context.module
    trace("before_passes", lambda: gm)
    graph = copy_graph(gm)
    for one in of_stage("dynamo", context):
        if run(one, graph, context) and one.run is not plan_linears:
            trace(f"after_{one.name}", lambda: module_of(graph, gm))
    return module_of(graph, gm)


def of_stage(stage: Stage, context: Context) -> tuple[Pass, ...]:
    """The passes of a stage that shall run, in their order."""
    disabled, inner = context.options.disabled_passes, context.options.inner_backend
    wanted = (p for p in PASSES if p.stage == stage and p.name not in disabled)
    return tuple(p for p in wanted if inner == "inductor" or not p.fuses)


def run(one: Pass, graph: Graph, context: Context) -> int:
    """Run one pass, and note what it did."""
    checked = spec.enabled or context.options.dump_graphs is not None
    before = set(graph.nodes) if checked else set()
    start = time.perf_counter()
    matches = one.run(graph, context)
    context.results.append(PassResult(one.name, matches, 1e3 * (time.perf_counter() - start)))
    if checked:
        spec.check(graph, context, one.stage, one.name, before)
    return matches
