"""Speed on a CPU: BF16 and float32, eager and compiled, torchao, and this backend in "fp8" and "int8".

Linears, one block each of Qwen-Image and Z-Image at the size of the released models, and the embedded pipelines end to
end. All cases of a workload are measured in turn, A B C A B C ..., with one thread and with all. With one thread the
clock is that of the CPU time of this process, which stands still while another one runs; with several it is the wall's.
Beside the time stand the signal-to-quantization-noise ratio of the result against eager float32, and the most memory
that one call took beyond what was resident before it (Linux: the peak of the resident set, which is reset before).

torchao's cases run where it is installed; its "int8" at the smallest linear only, because without VNNI its matmul runs
in a plain loop. A case that fails is listed with the reason.

What another CPU would do can be shown on this one: with ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2``, and a
``TORCHINDUCTOR_CACHE_DIR`` of its own, torch uses neither AVX512 nor its instructions for bfloat16. VNNI stays in use
by ``torch._int_mm``, so "int8" says nothing of a CPU without it.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .blocks import make_on_cpu
from .common import Spread, interleave, of_cpu, parser, sqnr, table, write
from .models import quantize_with_torchao

LINEARS = ((1024, 1024, 4096), (1024, 3072, 3072), (1024, 3072, 12288))
"""Rows, input features and output features."""

BLOCKS = {"qwen-image": 896, "z-image": 896}
"""Image tokens; 128 of text go with them."""

BASE = "float32, compiled"


@dataclass
class Workload:
    """What is measured.

    Attributes:
        module: in float32, with the keyword ``arguments`` of its call.
        cases: names of `CASES`.
    """

    name: str
    module: nn.Module
    arguments: dict[str, Any]
    cases: Sequence[str] = field(default_factory=lambda: [name for name in CASES if name != "torchao int8"])


def _torchao_row(module: nn.Module) -> Any:
    return torch.compile(quantize_with_torchao(module, "row"), dynamic=False)


def _torchao_int8(module: nn.Module) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(module, dynamic=False)


def _fp8(**options: Any) -> Callable[[nn.Module], Any]:
    return lambda module: torch.compile(module, backend="fp8_diffusion", options=options, dynamic=False)


CASES: dict[str, tuple[torch.dtype, Callable[[nn.Module], Any]]] = {
    BASE: (torch.float32, lambda module: torch.compile(module, dynamic=False)),
    "bfloat16, compiled": (torch.bfloat16, lambda module: torch.compile(module, dynamic=False)),
    "bfloat16, eager": (torch.bfloat16, lambda module: module),
    "torchao row-wise": (torch.bfloat16, _torchao_row),
    "torchao int8": (torch.bfloat16, _torchao_int8),
    "fp8": (torch.bfloat16, _fp8()),
    "int8": (torch.bfloat16, _fp8(method="int8")),
}


class _Wrapped(nn.Module):
    """A linear inside of a module, whose path quantization can name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


def workloads(only: Sequence[str]) -> list[Callable[[], Workload]]:
    """What to measure, made when its turn comes: a block takes gigabytes."""

    def linear(rows: int, k: int, n: int) -> Workload:
        torch.manual_seed(0)
        name = f"linear {rows} x {k} x {n}"
        cases = [case for case in CASES if case != "torchao int8" or (rows, k, n) == LINEARS[0]]
        return Workload(name, _Wrapped(nn.Linear(k, n)).requires_grad_(False), {"x": torch.randn(rows, k)}, cases)

    def block(name: str, tokens: int) -> Workload:
        return Workload(f"{name} block, {tokens} + 128 tokens", *make_on_cpu(name, tokens))

    made = [("linear", partial(linear, *size)) for size in LINEARS]
    made += [(name, partial(block, name, tokens)) for name, tokens in BLOCKS.items()]
    return [make for name, make in made if not only or name in only]


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    """Time, noise and memory of each case; a case that fails has its ``error`` only."""
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}
    expected = _values(work.module(**work.arguments))
    for name in work.cases:
        dtype, prepare = CASES[name]
        try:
            call = _call(prepare(copy.deepcopy(work.module).to(dtype)), work.arguments, dtype)
            call()
            got = _values(call())
        except Exception as error:  # of another library's, or of this CPU's: listed, not hidden
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        calls[name] = call
        results[name] = {"sqnr_db": None if name == BASE else sqnr(expected, got), "peak_mb": _peak(call)}
    for name, seconds in interleave({name: _timed(call) for name, call in calls.items()}, rounds).items():
        results[name]["seconds"] = Spread.of(seconds)
    torch._dynamo.reset()
    return results


def _call(module: Any, arguments: dict[str, Any], dtype: torch.dtype) -> Callable[[], Any]:
    given = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, arguments)
    return lambda: module(**given)


def _timed(call: Callable[[], Any]) -> Callable[[], float]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def run() -> float:
        start = clock()
        call()
        return clock() - start

    return run


def _values(out: Any) -> Tensor:
    return torch.cat([t.float().flatten() for t in tree_leaves(out) if isinstance(t, Tensor)])


def _peak(call: Callable[[], Any]) -> float | None:
    """Megabytes that the resident set grew by during a call; None where the kernel cannot say."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 1e3
    return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def pictures(rounds: int) -> dict[str, dict[str, Any]]:
    """The embedded pipelines, 8 steps of 64 x 64, compiled block by block."""
    from fp8_compile.pipelines.session import Session

    results: dict[str, dict[str, Any]] = {}
    for model in ("embedded:qwen-image", "embedded:z-image"):
        calls: dict[str, Callable[[], Any]] = {}
        for name, dtype, options in (
            ("float32, compiled", "float32", None),
            ("bfloat16, compiled", "bfloat16", None),
            ("fp8", "bfloat16", {}),
            ("int8", "bfloat16", {"method": "int8"}),
        ):
            session = Session.load(model, dtype=dtype, device="cpu", quantized=options is not None)
            if options is None:
                session.compile_unquantized()
            else:
                session.compile(options)
            session.pipe.set_progress_bar_config(disable=True)
            given = session.arguments(prompt="a red circle", num_inference_steps=8, height=64, width=64)
            calls[name] = partial(session.call, 0, **given)
            calls[name]()
        measured = interleave({name: _timed(call) for name, call in calls.items()}, rounds)
        results[model] = {name: {"seconds": Spread.of(seconds)} for name, seconds in measured.items()}
        torch._dynamo.reset()
    return results


def show(title: str, results: dict[str, Any]) -> None:
    base = results[BASE]["seconds"].least
    rows = []
    for name, found in results.items():
        if "error" in found:
            rows.append([name, "-", "-", "-", "-", found["error"]])
            continue
        sqnr, peak = found.get("sqnr_db"), found.get("peak_mb")
        rows.append(
            [
                name,
                found["seconds"].text(1e3, 1),
                f"{found['seconds'].least / base:.2f}",
                "" if sqnr is None else f"{sqnr:.1f}",
                "" if peak is None else f"{peak:.0f}",
                "",
            ]
        )
    print(f"\n{title}\n{table(['', 'ms', 'least, x float32', 'SQNR dB', 'peak MB', ''], rows)}", flush=True)


def main(given: argparse.Namespace) -> None:
    """Measure, print and write."""
    results: dict[str, Any] = {}
    instructions = {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "flags": sorted(
            {*of_cpu("flags").split()}
            & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni", "avx_vnni", "fma"}
        ),
        "environment": {name: os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")},
    }
    torch._dynamo.config.recompile_limit = 64  # all cases compile the same functions
    for threads in given.threads:
        torch.set_num_threads(threads)
        for make in workloads(given.only):
            work = make()
            with torch.no_grad():
                results[f"{work.name}, {threads} threads"] = measure(work, given.rounds)
            show(f"{work.name}, threads: {threads}", results[f"{work.name}, {threads} threads"])
        if not given.only or "pictures" in given.only:
            for model, found in pictures(given.rounds).items():
                show(f"{model}, threads: {threads}", found)
                results[f"{model}, {threads} threads"] = found
    write(given.output, {"instructions": instructions, "results": results})


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    p.add_argument("--only", nargs="+", default=[], choices=["linear", *BLOCKS, "pictures"])
    main(p.parse_args())
