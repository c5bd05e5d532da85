"""Hand the rewritten graph to the inner compiler."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from .options import Fp8Options
from .passes import pipeline


def compile_inner(gm: GraphModule, inputs: Sequence[Any], options: Fp8Options) -> Callable[..., Any]:
    """Compile ``gm`` with ``options.inner_backend``."""
    if options.inner_backend == "inductor":
        # torch.compile's own entrance to Inductor, for what it adds to compile_fx: modes and CUDA graph set-up.
        entrance: Any = torch._TorchCompileInductorWrapper
        backend = entrance(options.mode, {**options.inductor, **_settings(gm, options)}, None)
    elif callable(options.inner_backend):
        backend = options.inner_backend
    else:
        backend = torch._dynamo.lookup_backend(options.inner_backend)
    compiled: Callable[..., Any] = backend(gm, inputs)
    return compiled


def _settings(gm: GraphModule, options: Fp8Options) -> dict[str, Any]:
    """What this package itself sets in Inductor's configuration, on top of what the user set there."""
    from torch._inductor import config

    def current(name: str) -> Any:
        return options.inductor.get(name, getattr(config, name))

    # AOTAutograd caches a graph only if it knows each function in it. Ours are pure; their source is their identity.
    ours = {f"{f.__module__}.{f.__name__}": source_hash() for f in _functions(gm)}
    return {
        "post_grad_custom_post_pass": PostGradPasses(current("post_grad_custom_post_pass")),
        "unsafe_marked_cacheable_functions": {**current("unsafe_marked_cacheable_functions"), **ours},
    }


def _functions(gm: GraphModule) -> set[Any]:
    targets = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    return {t for t in targets if getattr(t, "__module__", "").startswith(f"{__package__}.")}


class PostGradPasses(CustomGraphPass):
    """The post-grad passes of `pipeline`, after those that the user's own setting holds."""

    def __init__(self, before: Any) -> None:
        self._before = () if before is None else tuple(before) if isinstance(before, (list, tuple)) else (before,)

    def __call__(self, graph: Graph) -> None:
        for user_pass in self._before:
            user_pass(graph)
        for run in pipeline.POST_GRAD:
            run(graph)

    def uuid(self) -> Any:
        """What identifies the passes in Inductor's caches; None (never cache) if a pass of the user's has no uuid."""
        users = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._before]
        return None if None in users else (source_hash(), *users)


@functools.cache
def source_hash() -> str:
    """A hash of this package's sources: compiled code from any other version of them must not be found in a cache."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.glob("passes/*.py")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
