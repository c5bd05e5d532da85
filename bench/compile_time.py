"""Compile time of one transformer block with ``backend="fp8_diffusion"`` against stock ``backend="inductor"``.

Method: each measurement is a process of its own. It imports everything and compiles a trivial function with stock
Inductor (imports and the probing of the C++ compiler belong to neither side), then times the first call of the compiled
block, less a later one:

    compile = first call - median of three later calls

``cold``: with an empty TORCHINDUCTOR_CACHE_DIR of its own. ``warm``: a second process with the same directory, whose
counters say whether it found what the first had stored. The backends alternate; medians are compared:

    ratio = median(compile of fp8_diffusion) / median(compile of inductor)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .common import Spread, call_of, interleave, parser, qwen_image, ratio_of_medians, table, write, z_image

TARGET = 1.25
BACKENDS = ("inductor", "fp8_diffusion")
# Wide enough that the default options convert every linear but the modulation's; Z-Image's MLP needs a multiple of 384.
BLOCKS: dict[str, int] = {"QwenImage": 256, "ZImage": 384}
COUNTERS = {
    "fx_graph_hits": ("inductor", "fxgraph_cache_hit"),
    "fx_graph_misses": ("inductor", "fxgraph_cache_miss"),
    "fx_graph_bypasses": ("inductor", "fxgraph_cache_bypass"),
    "autograd_hits": ("aot_autograd", "autograd_cache_hit"),
    "autograd_misses": ("aot_autograd", "autograd_cache_miss"),
    "autograd_bypasses": ("aot_autograd", "autograd_cache_bypass"),
}
RESULT = "result: "


def measure(name: str, backend: str) -> dict[str, Any]:
    """Compile one block in this process, with whatever the cache directory holds."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics, counters

    build = {"QwenImage": partial(qwen_image, 1), "ZImage": partial(z_image, 1)}[name]
    model, inputs = build(BLOCKS[name])
    block: Any = (model.transformer_blocks if name == "QwenImage" else model.layers)[0]  # type: ignore[index]
    args, kwargs = call_of(model, inputs, block)
    torch._dynamo.lookup_backend("fp8_diffusion")
    with torch.no_grad():
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64))
        counters.clear()
        compilation_time_metrics.clear()
        block.compile(backend=backend, fullgraph=True)

        def call() -> float:
            start = time.perf_counter()
            block(*args, **kwargs)
            return time.perf_counter() - start

        first = call()
        metrics = {phase: sum(times) for phase, times in compilation_time_metrics.items()}
        later = Spread.of([call() for _ in range(3)]).median
    return {
        "compile_s": first - later,
        "linears_fp8": _converted(model) if backend == "fp8_diffusion" else 0,
        "kernels": counters["inductor"]["cpp_kernel_count"] or torch._inductor.metrics.generated_kernel_count,
        "counters": {label: counters[group][key] for label, (group, key) in COUNTERS.items()},
        "phases_s": {phase: seconds for phase, seconds in metrics.items() if seconds > 0.01 * first},
    }


def _converted(model: Any) -> int:
    import fp8_compile

    return sum(row.decision == "fp8" for row in fp8_compile.report(model).layers)


def in_a_process(name: str, backend: str, cache: Path) -> dict[str, Any]:
    """`measure` in a new process that keeps its caches in ``cache``."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    command = [sys.executable, "-m", __spec__.name, "--worker", name, backend]
    here = Path(__file__).parent.parent
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not answers:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(RESULT))
    return answer


def run(name: str, rounds: int) -> dict[str, Any]:
    """Cold and warm measurements of one block, the backends in turn."""
    details: dict[str, list[dict[str, Any]]] = {f"{b} {state}": [] for b in BACKENDS for state in ("cold", "warm")}

    def case(backend: str) -> Callable[[], float]:
        def once() -> float:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    details[f"{backend} {state}"].append(in_a_process(name, backend, Path(cache)))
                    print(f"{name} {backend} {state} {details[f'{backend} {state}'][-1]['compile_s']:.1f}", file=sys.stderr)
            return float(details[f"{backend} cold"][-1]["compile_s"])

        return once

    interleave({backend: case(backend) for backend in BACKENDS}, rounds)
    times = {key: [float(one["compile_s"]) for one in found] for key, found in details.items()}
    ratio = {state: ratio_of_medians(times[f"fp8_diffusion {state}"], times[f"inductor {state}"]) for state in ("cold", "warm")}
    pairs = {
        state: Spread.of([f / i for f, i in zip(times[f"fp8_diffusion {state}"], times[f"inductor {state}"], strict=True)])
        for state in ("cold", "warm")
    }
    return {
        "width": BLOCKS[name],
        "compile_s": {key: Spread.of(values) for key, values in times.items()},
        "ratio": ratio,
        "ratio_of_pairs": pairs,
        "met": ratio["cold"] <= TARGET,
        "measurements": details,
    }


def show(results: dict[str, Any]) -> str:
    """The results as a table."""
    rows = []
    for name, block in results["blocks"].items():
        for state in ("cold", "warm"):
            for backend in BACKENDS:
                one = block["measurements"][f"{backend} {state}"][-1]
                counts = one["counters"]
                ours = backend == "fp8_diffusion"
                rows.append(
                    [
                        f"{name} {block['width']} {state} {backend}",
                        block["compile_s"][f"{backend} {state}"].text(),
                        f"{block['ratio'][state]:.2f}" if ours else "",
                        block["ratio_of_pairs"][state].text() if ours else "",
                        ("yes" if block["met"] else "NO") if ours and state == "cold" else "",
                        str(one["linears_fp8"]),
                        str(one["kernels"]),
                        f"{counts['fx_graph_hits']}/{counts['fx_graph_misses']}/{counts['fx_graph_bypasses']}",
                        f"{counts['autograd_hits']}/{counts['autograd_misses']}/{counts['autograd_bypasses']}",
                    ]
                )
    header = [
        "block",
        "compile s [quartiles]",
        "ratio",
        "per pair",
        f"<= {TARGET:g}",
        "fp8",
        "kernels",
        "fx hit/miss/bypass",
        "aot hit/miss/bypass",
    ]
    return table(header, rows)


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--worker", nargs=2, metavar=("BLOCK", "BACKEND"), help="measure once, in this process")
    given = p.parse_args()
    if given.worker:
        print(RESULT + json.dumps(measure(*given.worker)))
        return 0
    results = {"target": TARGET, "blocks": {name: run(name, given.rounds) for name in given.blocks}}
    print(show(results))
    write(given.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
