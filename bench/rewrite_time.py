"""Time that ``fp8_diffusion`` itself takes, from Dynamo's graph to the inner compiler, for whole Qwen-Image models.

Method: Dynamo captures a `QwenImageTransformer2DModel` of tiny width once for each number of blocks. ``first`` is the
backend's time in that capture, with all of Dynamo's contexts around it: what a user pays. Since it happens once, the
same is measured again on copies of the graphs, all sizes in turn: ``again``. The inner backend returns at once, so that
plan, rewrite and binder are all there is. A capture of one block comes before, for what only a process's first graph
pays: imports, and fake tensors' caches. All of it is one thread's work, so its CPU time says what the wall-clock time
would be on a machine of one's own; ``least`` is the fastest of ``again``, since neighbours on a core slow CPU time too.
With c and p fitted by least squares in log-log space, to ``first`` and to ``least``:

    seconds(blocks) = c * blocks ** p

``--profile`` prints instead where the time of the largest graph goes.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from .common import Spread, exponent, interleave, parser, qwen_image, table, write

TARGET = 1.0


@dataclass(frozen=True)
class Seconds:
    """How long something took, by the clock and in CPU time of this thread."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Seconds:
        wall, cpu = time.perf_counter(), time.thread_time()
        work()
        return cls(time.perf_counter() - wall, time.thread_time() - cpu)


@dataclass(frozen=True)
class Captured:
    """A model's graph, the time of its capture, and that of the backend in it."""

    gm: GraphModule
    example_inputs: list[Any]
    capture: Seconds
    first: Seconds


def ours(gm: GraphModule, example_inputs: Sequence[Any]) -> int:
    """All of ``fp8_diffusion`` but the inner compiler; modulation linears have one row, and are converted too.

    Returns:
        How many linears became FP8.
    """
    converted = 0

    def compile_inner(rewritten: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal converted
        converted = sum(getattr(node.target, "__name__", "") == "scaled_linear" for node in rewritten.graph.nodes)
        return gm.forward

    options = {"min_features": 64, "min_m": 1, "strict": True, "inner_backend": compile_inner}
    torch._dynamo.lookup_backend("fp8_diffusion")(gm, example_inputs, options=options)
    return converted


def capture(blocks: int) -> Captured:
    """Let Dynamo capture a model of ``blocks`` blocks."""
    from fp8_compile.passes.graphs import copy_graph, module_of

    model, inputs = qwen_image(blocks)
    torch.compiler.reset()
    kept: list[tuple[GraphModule, list[Any], Seconds]] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # Dynamo strips its graph of the example values as soon as the backend has returned.
        copied = module_of(copy_graph(gm), gm)
        first = Seconds.of(partial(ours, gm, example_inputs))
        kept.append((copied, list(example_inputs), first))
        return gm.forward

    with torch.no_grad():
        took = Seconds.of(partial(torch.compile(model, backend=backend, fullgraph=True), **inputs))
    ((gm, example_inputs, first),) = kept
    return Captured(gm, example_inputs, took, first)


def seconds(captured: Captured) -> float:
    """The CPU time of `ours` on ``captured``, whose graph stays as it is; under Dynamo's setting for graph modules."""
    with torch.no_grad(), _use_lazy_graph_module(torch._dynamo.config.use_lazy_graph_module):
        return Seconds.of(partial(ours, captured.gm, captured.example_inputs)).cpu


def run(sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Capture, measure and fit all ``sizes``."""
    warm = capture(1)
    graphs = {blocks: capture(blocks) for blocks in sizes}
    cases = {str(blocks): partial(seconds, graph) for blocks, graph in graphs.items()}
    with torch.no_grad():
        converted = {blocks: ours(graph.gm, graph.example_inputs) for blocks, graph in graphs.items()}
    measured = interleave(cases, rounds)
    again = {blocks: Spread.of(measured[str(blocks)]) for blocks in sizes}
    return {
        "target_s": TARGET,
        "process_first_s": asdict(warm.first),
        "sizes": {
            str(blocks): {
                "nodes": len(graph.gm.graph.nodes),
                "converted": converted[blocks],
                "capture_s": asdict(graph.capture),
                "first_s": asdict(graph.first),
                "again_cpu_s": again[blocks],
                "share_of_capture": graph.first.cpu / graph.capture.cpu,
            }
            for blocks, graph in graphs.items()
        },
        "exponent_first": exponent(sizes, [graph.first.cpu for graph in graphs.values()]),
        "exponent_again": exponent(sizes, [again[blocks].least for blocks in sizes]),
        "met": all(graph.first.cpu < TARGET for graph in graphs.values()),
        "rounds": measured,
    }


def show(results: dict[str, Any]) -> str:
    """The results as a table."""
    rows = [
        [
            blocks,
            str(size["nodes"]),
            str(size["converted"]),
            f"{size['first_s']['wall']:.2f}",
            f"{size['first_s']['cpu']:.2f}",
            size["again_cpu_s"].text(),
            f"{size['again_cpu_s'].least:.2f}",
            f"{size['capture_s']['cpu']:.1f}",
            f"{size['share_of_capture']:.1%}",
        ]
        for blocks, size in results["sizes"].items()
    ]
    header = [
        "blocks",
        "nodes",
        "fp8",
        "first, wall s",
        "first, CPU s",
        "again, CPU s",
        "least",
        "with Dynamo, CPU s",
        "share",
    ]
    return (
        table(header, rows)
        + f"\nexponent: first {results['exponent_first']:.2f}, least {results['exponent_again']:.2f} (CPU)"
        + f"; the process's first graph, 1 block: {results['process_first_s']['cpu']:.2f} s"
        + f"\nfirst below {TARGET:g} s of CPU: {'yes' if results['met'] else 'NO'}"
    )


def profile(blocks: int) -> None:
    """Print where the time of a model's graph goes."""
    graph = capture(blocks)
    seconds(graph)
    profiler = cProfile.Profile()
    profiler.runcall(seconds, graph)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--blocks", type=int, nargs="+", default=[15, 30, 60])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--profile", action="store_true")
    given = p.parse_args()
    if given.profile:
        profile(max(given.blocks))
        return 0
    results = run(given.blocks, given.rounds)
    print(show(results))
    write(given.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
