"""The order of the passes, and the trace that each leaves.

On Dynamo's graph:

1. `plan_linears`: decides; it must see the graph as the user wrote it, since it names nodes of that graph.

On a copy of it:

2. `real_rotary`: touches no linear, and none touches it; before the next only because that needs the plan.
3. `quantize_linears`: carries the plan out.

On the graph after AOTAutograd, through Inductor's ``post_grad_custom_post_pass``:

4. `one_fp8_copy`: last, because earlier passes of Inductor's read the metadata that it takes away.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph, GraphModule

from .graphs import copy_graph, module_of
from .one_fp8_copy import one_fp8_copy
from .plan import Plan
from .quantize_linears import Constant, quantize_linears
from .real_rotary import real_rotary

PRE_GRAD: dict[str, Callable[[Graph], int]] = {"real_rotary": real_rotary}
POST_GRAD: dict[str, Callable[[Graph], int]] = {"one_fp8_copy": one_fp8_copy}
HEURISTICS = ("whole_rows",)
"""What could be a pass, but is done by steering Inductor: see `fp8_compile.inductor`."""

Trace = Callable[[str, Callable[[], GraphModule]], None]
"""Receives a stage's name, and what makes the graph at that stage."""


def rewrite(
    gm: GraphModule, plan: Plan, trace: Trace, disabled: tuple[str, ...] = ()
) -> tuple[GraphModule, list[Constant]]:
    """Run the passes on a copy of Dynamo's graph, but for those that are ``disabled``.

    Returns:
        The rewritten graph, and the constants that it takes as further inputs.
    """
    trace("before_passes", lambda: gm)
    graph = copy_graph(gm)
    for name, run in PRE_GRAD.items():
        if name not in disabled and run(graph):
            trace(f"after_{name}", lambda: module_of(graph, gm))
    constants = quantize_linears(graph, plan)
    rewritten = module_of(graph, gm)
    trace("after_quantize_linears", lambda: rewritten)
    return rewritten, constants
