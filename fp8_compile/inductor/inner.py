"""Hand the rewritten graph to the inner compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from ..passes import pipeline
from ..passes.context import Context, PassResult
from .source_hash import source_hash


def compile_inner(gm: GraphModule, inputs: Sequence[Any], context: Context) -> Callable[..., Any]:
    """Compile ``gm`` with ``options.inner_backend``; notes in ``context`` what the passes inside it did."""
    options = context.options
    inductor = options.inner_backend == "inductor"
    steering: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if inductor and "whole_rows" not in options.disabled_passes:
        from .whole_rows import whole_rows

        steering = whole_rows()
    hits = _cache_hits()
    with steering:
        compiled = cast("Callable[..., Any]", _backend(gm, context)(gm, inputs))
    ran = {result.name for result in context.results}
    name = getattr(options.inner_backend, "__qualname__", options.inner_backend)
    note = "from cache" if _cache_hits() > hits else f"not run by inner_backend {name!r}"
    for one in pipeline.PASSES:
        if one.name in options.disabled_passes:
            context.results.append(PassResult(one.name, note="disabled"))
        elif one.name not in ran:
            context.results.append(PassResult(one.name, note=note))
    return compiled


def _cache_hits() -> int:
    """How often Inductor's caches, or AOTAutograd's, had a graph in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])


def _backend(gm: GraphModule, context: Context) -> Any:
    options = context.options
    if options.inner_backend == "inductor":
        # torch.compile's own entrance to Inductor, for what it adds to compile_fx: modes and CUDA graph set-up.
        entrance: Any = torch._TorchCompileInductorWrapper
        return entrance(options.mode, {**options.inductor, **_settings(gm, context)}, None)
    if callable(options.inner_backend):
        return options.inner_backend
    return torch._dynamo.lookup_backend(options.inner_backend)


# Inductor stores an intermediate result in memory when more than so many operators are needed to compute it again, or
# so many values are read in a reduction. Between a row's amax and its cast to FP8, that means a BF16 activation written
# and read back. Defaults on a GPU: 30 and 8. How many values are read elsewhere stays Inductor's affair: with a higher
# threshold fewer bytes move, but kernels compute so much twice that `bench.kernels` has them slower.
_THRESHOLDS = {
    "realize_opcount_threshold": 200,
    "realize_acc_reads_threshold": 32,
}


def _settings(gm: GraphModule, context: Context) -> dict[str, Any]:
    """What this package itself sets in Inductor's configuration, on top of what the user set there."""
    from torch._inductor import config

    options = context.options

    def current(name: str) -> Any:
        return options.inductor.get(name, getattr(config, name))

    # AOTAutograd caches a graph only if it knows each function in it. Ours are pure; their source is their identity.
    ours = {f"{f.__module__}.{f.__name__}": source_hash() for f in _functions(gm)}
    return {
        # None stands for a default of Inductor's that depends on the device.
        **{name: max(current(name) or 0, least) for name, least in _THRESHOLDS.items() if name not in options.inductor},
        "post_grad_custom_post_pass": PostGradPasses(current("post_grad_custom_post_pass"), context),
        "unsafe_marked_cacheable_functions": {**current("unsafe_marked_cacheable_functions"), **ours},
    }


def _functions(gm: GraphModule) -> set[Any]:
    targets = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    return {t for t in targets if getattr(t, "__module__", "").startswith("fp8_compile.")}


class PostGradPasses(CustomGraphPass):
    """The post-grad passes of `pipeline`, after those that the user's own setting holds."""

    def __init__(self, before: Any, context: Context) -> None:
        from .whole_rows import heuristics_in_force

        self._context = context
        self._passes = pipeline.of_stage("post_grad", context)
        self._heuristics = heuristics_in_force()
        self._before = () if before is None else tuple(before) if isinstance(before, (list, tuple)) else (before,)

    def __call__(self, graph: Graph) -> None:
        for user_pass in self._before:
            user_pass(graph)
        for one in self._passes:
            pipeline.run(one, graph, self._context)

    def uuid(self) -> Any:
        """What identifies the passes in Inductor's caches; None (never cache) if a pass of the user's has no uuid.

        Includes the active heuristics, since Inductor's cache key does not.
        """
        users = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._before]
        names = [one.name for one in self._passes]
        return None if None in users else (source_hash(), *names, self._heuristics, *users)
