"""The order of the passes, and the trace that each leaves.

On Dynamo's graph:

1. `plan_linears`: decides; it must see the graph as the user wrote it, since it names nodes of that graph.
2. `quantize_linears`: carries the plan out.

On the graph after AOTAutograd, through Inductor's ``post_grad_custom_post_pass``:

3. `one_fp8_copy`: last, because earlier passes of Inductor's read the metadata that it takes away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule

from .graphs import copy_graph, module_of
from .one_fp8_copy import one_fp8_copy
from .plan import Plan
from .quantize_linears import Constant, quantize_linears

POST_GRAD: tuple[Callable[[torch.fx.Graph], int], ...] = (one_fp8_copy,)

Trace = Callable[[str, GraphModule], None]
"""Receives a stage's name and the graph at that stage."""


def rewrite(gm: GraphModule, plan: Plan, trace: Trace) -> tuple[GraphModule, list[Constant]]:
    """Run the passes on a copy of Dynamo's graph.

    Returns:
        The rewritten graph, and the constants that it takes as further inputs.
    """
    trace("before_quantize_linears", gm)
    graph = copy_graph(gm)
    constants = quantize_linears(graph, plan)
    rewritten = module_of(graph, gm)
    trace("after_quantize_linears", rewritten)
    return rewritten, constants
