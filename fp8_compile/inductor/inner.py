"""Hand the rewritten graph to the inner compiler."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from ..options import Fp8Options
from ..passes import pipeline


def compile_inner(gm: GraphModule, inputs: Sequence[Any], options: Fp8Options) -> Callable[..., Any]:
    """Compile ``gm`` with ``options.inner_backend``."""
    steered = options.inner_backend == "inductor" and "whole_rows" not in options.disabled_passes
    with _whole_rows() if steered else contextlib.nullcontext():
        return cast("Callable[..., Any]", _backend(gm, options)(gm, inputs))


def _backend(gm: GraphModule, options: Fp8Options) -> Any:
    if options.inner_backend == "inductor":
        # torch.compile's own entrance to Inductor, for what it adds to compile_fx: modes and CUDA graph set-up.
        entrance: Any = torch._TorchCompileInductorWrapper
        return entrance(options.mode, {**options.inductor, **_settings(gm, options)}, None)
    if callable(options.inner_backend):
        return options.inner_backend
    return torch._dynamo.lookup_backend(options.inner_backend)


# Inductor stores an intermediate result in memory when more than so many values are read, or operators are needed, to
# compute it again. Between a row's amax and its cast to FP8, that means a BF16 activation written and read back; below
# these, none of the blocks in bench/blocks.py has such a round trip. Defaults on a GPU: 4, 30 and 8.
_THRESHOLDS = {
    "realize_reads_threshold": 16,
    "realize_opcount_threshold": 200,
    "realize_acc_reads_threshold": 32,
}


def _settings(gm: GraphModule, options: Fp8Options) -> dict[str, Any]:
    """What this package itself sets in Inductor's configuration, on top of what the user set there."""
    from torch._inductor import config

    def current(name: str) -> Any:
        return options.inductor.get(name, getattr(config, name))

    # AOTAutograd caches a graph only if it knows each function in it. Ours are pure; their source is their identity.
    ours = {f"{f.__module__}.{f.__name__}": source_hash() for f in _functions(gm)}
    return {
        # None stands for a default of Inductor's that depends on the device.
        **{name: max(current(name) or 0, least) for name, least in _THRESHOLDS.items() if name not in options.inductor},
        "post_grad_custom_post_pass": PostGradPasses(current("post_grad_custom_post_pass"), options.disabled_passes),
        "unsafe_marked_cacheable_functions": {**current("unsafe_marked_cacheable_functions"), **ours},
    }


def _functions(gm: GraphModule) -> set[Any]:
    targets = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    return {t for t in targets if getattr(t, "__module__", "").startswith("fp8_compile.")}


class PostGradPasses(CustomGraphPass):
    """The post-grad passes of `pipeline`, after those that the user's own setting holds."""

    def __init__(self, before: Any, disabled: tuple[str, ...] = ()) -> None:
        self._passes = {name: run for name, run in pipeline.POST_GRAD.items() if name not in disabled}
        self._heuristics = _heuristics()
        self._before = () if before is None else tuple(before) if isinstance(before, (list, tuple)) else (before,)

    def __call__(self, graph: Graph) -> None:
        for user_pass in self._before:
            user_pass(graph)
        for run in self._passes.values():
            run(graph)

    def uuid(self) -> Any:
        """What identifies the passes in Inductor's caches; None (never cache) if a pass of the user's has no uuid.

        Heuristics that were in force when this was made count too: nothing else tells the caches of them.
        """
        users = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._before]
        return None if None in users else (source_hash(), *self._passes, self._heuristics, *users)


def _heuristics() -> str:
    from torch._inductor.virtualized import V

    kind = type(V.choices)
    uuid = getattr(V.choices, "uuid", None)
    return f"{kind.__module__}.{kind.__qualname__} {uuid() if callable(uuid) else ''}"


def _whole_rows() -> contextlib.AbstractContextManager[Any]:
    """Our heuristics for the compilation inside, unless others than Inductor's own are in force."""
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    if type(V.choices) is not InductorChoices:
        return contextlib.nullcontext()

    class WholeRows(InductorChoices):
        """For kernels whose thread blocks reduce a row each, as the quantization of an activation does."""

        # Static methods in InductorChoices until torch 2.13, methods since.
        def reduction_split_factor(  # type: ignore[override, unused-ignore]
            self, device: torch.device, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool
        ) -> int:
            # Splitting a row over several thread blocks costs two kernels more, and the activation a round trip.
            rows = inner_reduction or _may_be_a_concatenation(reduction_numel_hint, numel_hint)
            if rows and numel_hint >= _MANY_ROWS and reduction_numel_hint <= _LONG_ROW:
                return 1
            given = device, reduction_numel_hint, numel_hint, inner_reduction
            return int(super().reduction_split_factor(*given))

        def should_use_persistent_reduction(  # type: ignore[override, unused-ignore]
            self, features: Any, cooperative_reduction: bool
        ) -> bool:
            # In a loop, everything fused before the amax would be computed a second time for the cast.
            rows = features.get_reduction_hint() == ReductionHint.INNER
            strict = getattr(features, "strict_reduction_rblock", lambda: None)() is not None  # torch 2.15
            if rows and not (cooperative_reduction or strict) and config.triton.persistent_reductions:
                return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, _PERSISTENT_ROW))
            return bool(super().should_use_persistent_reduction(features, cooperative_reduction))

        def uuid(self) -> str:
            return source_hash()

    return cast("contextlib.AbstractContextManager[Any]", V.set_choices_handler(WholeRows()))


# With a row each, half the multiprocessors of an H200 are busy; and a thread block reads so many values in the time
# that launching another kernel takes.
_MANY_ROWS, _LONG_ROW = 64, 65536
# What 512 threads, the most that Inductor gives to such a kernel, hold in registers: 32 values each.
_PERSISTENT_ROW = 16384


def _may_be_a_concatenation(width: int, rows: int) -> bool:
    """Before torch 2.13, Inductor takes the rows of a concatenation, such as in FLUX's single blocks, for columns."""
    old = torch.torch_version.TorchVersion(torch.__version__) < "2.13"
    return old and width > 8192 and rows >= 1024  # columns so long would be sums over all tokens of a video


@functools.cache
def source_hash() -> str:
    """A hash of this package's sources: compiled code from any other version of them must not be found in a cache."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
