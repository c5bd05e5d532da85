"""Compile time of one transformer block with ``backend="fp8_diffusion"`` against stock ``backend="inductor"``.

Method: each measurement is a process of its own. It imports everything and compiles a trivial function with stock
Inductor (imports and the probing of the C++ compiler belong to neither side), then times the first call of the compiled
block, less a later one:

    compile = first call - median of three later calls

in wall-clock time and in CPU time, which a shared machine disturbs less. The latter is also split into that of this
process, ``own``, and that of the C++ compiler, which has no counterpart on a GPU. To that end Inductor compiles without
its pool of workers: then all compilers are children of this process, and the operating system accounts for them.

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
STATES = ("cold", "warm")
CLOCKS = {"compile_s": "wall s", "cpu_s": "CPU s", "own_cpu_s": "own CPU s"}
# Wide enough that the default options convert every linear but the modulation's; Z-Image's MLP needs a multiple of 384.
BLOCKS: dict[str, int] = {"QwenImage": 256, "ZImage": 384}
CACHES = {"fx": ("inductor", "fxgraph_cache"), "aot": ("aot_autograd", "autograd_cache")}
EVENTS = {"hits": "hit", "misses": "miss", "bypasses": "bypass"}
RESULT = "result: "


def measure(name: str, backend: str) -> dict[str, Any]:
    """Compile one block in this process, with whatever the cache directory holds."""
    import torch
    from torch._dynamo.utils import compilation_time_metrics, counters
    from torch._inductor import metrics

    build = {"QwenImage": partial(qwen_image, 1), "ZImage": partial(z_image, 1)}[name]
    model, inputs = build(BLOCKS[name])
    block: Any = (model.transformer_blocks if name == "QwenImage" else model.layers)[0]  # type: ignore[index]
    args, kwargs = call_of(model, inputs, block)
    torch._dynamo.lookup_backend("fp8_diffusion")
    from fp8_compile.inductor.inner import (
        source_hash,  # after Inductor, which registers the operators that the passes name
    )

    with torch.no_grad():
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64))
        counters.clear()
        compilation_time_metrics.clear()
        metrics.reset()
        block.compile(backend=backend, fullgraph=True)

        def call() -> tuple[float, float, float]:
            wall, cpu = time.perf_counter(), os.times()
            block(*args, **kwargs)
            took = [after - before for before, after in zip(cpu, os.times(), strict=True)]
            return time.perf_counter() - wall, sum(took[:4]), sum(took[:2])

        first = call()
        phases = {phase: sum(times) for phase, times in compilation_time_metrics.items()}
        later = [Spread.of(times).median for times in zip(*(call() for _ in range(3)), strict=True)]
    return {
        **{clock: a - b for clock, a, b in zip(CLOCKS, first, later, strict=True)},
        "sources": source_hash(),
        "linears_fp8": _converted(model) if backend == "fp8_diffusion" else 0,
        "kernels": metrics.generated_kernel_count,
        "counters": {
            f"{cache}_{label}": counters[group][f"{prefix}_{event}"]
            for cache, (group, prefix) in CACHES.items()
            for label, event in EVENTS.items()
        },
        "phases_s": {phase: seconds for phase, seconds in phases.items() if seconds > 0.01 * first[0]},
    }


def _converted(model: Any) -> int:
    import fp8_compile

    return sum(row.decision == "quantized" for row in fp8_compile.report(model).layers)


def in_a_process(name: str, backend: str, cache: Path) -> dict[str, Any]:
    """`measure` in a new process that keeps its caches in ``cache``."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
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
    details: dict[str, list[dict[str, Any]]] = {f"{b} {state}": [] for b in BACKENDS for state in STATES}

    def case(backend: str) -> Callable[[], float]:
        def once() -> float:
            with tempfile.TemporaryDirectory() as cache:
                for state in STATES:
                    one = in_a_process(name, backend, Path(cache))
                    details[f"{backend} {state}"].append(one)
                    took = f"{one['compile_s']:.1f} s, CPU {one['cpu_s']:.1f} s"
                    print(f"{name} {backend} {state}: {took}", file=sys.stderr)
            return float(details[f"{backend} cold"][-1]["compile_s"])

        return once

    interleave({backend: case(backend) for backend in BACKENDS}, rounds)
    if len({one["sources"] for found in details.values() for one in found}) != 1:
        raise RuntimeError("the sources of fp8_compile changed while they were measured: every cache missed")
    answer: dict[str, Any] = {"width": BLOCKS[name], "ratio": {}, "ratio_of_pairs": {}, "measurements": details}
    for clock in CLOCKS:
        times = {key: [float(one[clock]) for one in found] for key, found in details.items()}
        answer[clock] = {key: Spread.of(values) for key, values in times.items()}
        for state in STATES:
            ours, stock = (times[f"{backend} {state}"] for backend in ("fp8_diffusion", "inductor"))
            answer["ratio"][f"{state} {clock}"] = ratio_of_medians(ours, stock)
            answer["ratio_of_pairs"][f"{state} {clock}"] = Spread.of([f / i for f, i in zip(ours, stock, strict=True)])
    answer["met"] = {clock: answer["ratio"][f"cold {clock}"] <= TARGET for clock in CLOCKS}
    return answer


def show(results: dict[str, Any]) -> str:
    """The results as a table."""
    rows = []
    for name, block in results["blocks"].items():
        for state in STATES:
            for backend in BACKENDS:
                found = block["measurements"][f"{backend} {state}"]
                row = [f"{name} {block['width']} {state} {backend}"]
                for clock in CLOCKS:
                    ratio = f"{block['ratio'][f'{state} {clock}']:.2f}" if backend == "fp8_diffusion" else ""
                    row += [block[clock][f"{backend} {state}"].text(digits=1), ratio]
                row += [str(found[-1]["linears_fp8"]), str(found[-1]["kernels"])]
                counts = found[-1]["counters"]
                row += ["/".join(str(counts[f"{c}_{k}"]) for k in EVENTS) for c in CACHES]
                rows.append(row)
    header = [
        "block",
        *(cell for name in CLOCKS.values() for cell in (f"{name} [quartiles]", "ratio")),
        "fp8",
        "kernels",
    ]
    header += [f"{cache} hit/miss/bypass" for cache in CACHES]
    verdicts = [
        f"{name} " + ", ".join(f"{CLOCKS[clock]} {'yes' if met else 'NO'}" for clock, met in block["met"].items())
        for name, block in results["blocks"].items()
    ]
    return table(header, rows) + f"\ncold ratio <= {TARGET:g}: " + "; ".join(verdicts)


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
