"""Time that ``fp8_diffusion`` itself takes, from Dynamo's graph to the inner compiler, for whole Qwen-Image models.

Method: Dynamo captures a `QwenImageTransformer2DModel` of tiny width once for each number of blocks. ``first`` is the
backend's time in that capture, with all of Dynamo's contexts around it: what a user pays. Since it happens once, the
same is measured again on copies of the graphs, all sizes in turn: ``again``. The inner backend returns at once, so that
plan, rewrite and binder are all there is. A capture of one block comes before, for what only a process's first graph
pays: imports, and fake tensors' caches. With c the least-squares constant and p the slope in log-log space:

    seconds(blocks) = c * blocks ** p

``--profile`` prints instead where the time of the largest graph goes.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from .common import Spread, exponent, interleave, parser, qwen_image, table, write

TARGET = 1.0
LINEARS_PER_BLOCK = 14


@dataclass(frozen=True)
class Captured:
    """A model's graph, and how long its capture took with (``capture_s``) and in (``first_s``) the backend."""

    gm: GraphModule
    example_inputs: list[Any]
    capture_s: float
    first_s: float

    @property
    def nodes(self) -> int:
        return len(self.gm.graph.nodes)


def ours(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """All of ``fp8_diffusion`` but the inner compiler. Modulation linears have one row, and are converted too."""
    options = {"min_features": 64, "min_rows": 1, "strict": True, "inner_backend": lambda graph, inputs: graph.forward}
    backend: Callable[..., Any] = torch._dynamo.lookup_backend("fp8_diffusion")
    return backend(gm, example_inputs, options=options)


def capture(blocks: int) -> Captured:
    """Let Dynamo capture a model of ``blocks`` blocks."""
    from fp8_compile.passes.graphs import copy_graph_module

    model, inputs = qwen_image(blocks)
    torch.compiler.reset()
    kept: list[tuple[GraphModule, list[Any], float]] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # Dynamo strips its graph of the example values as soon as the backend has returned.
        copied = copy_graph_module(gm)
        start = time.perf_counter()
        ours(gm, example_inputs)
        kept.append((copied, list(example_inputs), time.perf_counter() - start))
        return gm.forward

    start = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    capture_s = time.perf_counter() - start
    ((gm, example_inputs, first_s),) = kept
    return Captured(gm, example_inputs, capture_s, first_s)


def seconds(captured: Captured) -> float:
    """The time of `ours` on ``captured``, whose graph stays as it is."""
    with torch.no_grad():
        start = time.perf_counter()
        ours(captured.gm, captured.example_inputs)
        return time.perf_counter() - start


def run(sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Capture, measure and fit all ``sizes``."""
    warm = capture(1)
    graphs = {blocks: capture(blocks) for blocks in sizes}
    cases = {str(blocks): partial(seconds, graph) for blocks, graph in graphs.items()}
    interleave(cases, 1)
    measured = interleave(cases, rounds)
    again = {blocks: Spread.of(measured[str(blocks)]) for blocks in sizes}
    return {
        "target_s": TARGET,
        "process_first_s": warm.first_s,
        "sizes": {
            str(blocks): {
                "nodes": graph.nodes,
                "linears": blocks * LINEARS_PER_BLOCK,
                "first_s": graph.first_s,
                "again_s": again[blocks],
                "capture_s": graph.capture_s,
                "share_of_capture": graph.first_s / graph.capture_s,
            }
            for blocks, graph in graphs.items()
        },
        "exponent_first": exponent(sizes, [graphs[blocks].first_s for blocks in sizes]),
        "exponent_again": exponent(sizes, [again[blocks].median for blocks in sizes]),
        "met": max(graph.first_s for graph in graphs.values()) < TARGET,
        "rounds": measured,
    }


def show(results: dict[str, Any]) -> str:
    """The results as a table."""
    rows = [
        [
            blocks,
            str(size["nodes"]),
            f"{size['first_s']:.3f}",
            size["again_s"].text(digits=3),
            f"{size['first_s'] / int(blocks) * 1e3:.1f}",
            f"{size['capture_s']:.1f}",
            f"{size['share_of_capture']:.1%}",
        ]
        for blocks, size in results["sizes"].items()
    ]
    header = ["blocks", "nodes", "first s", "again s [quartiles]", "ms/block", "Dynamo + first s", "share"]
    return (
        table(header, rows)
        + f"\nexponent: first {results['exponent_first']:.2f}, again {results['exponent_again']:.2f}"
        + f"; process's first graph (1 block): {results['process_first_s']:.3f} s"
        + f"\nall below {TARGET:g} s: {'yes' if results['met'] else 'NO'}"
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
