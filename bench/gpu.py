"""The whole forward pass of Qwen-Image, Z-Image and FLUX.1-dev at 1024 x 1024: BF16, torchao and ``fp8_diffusion``.

    python -m bench.gpu --output bench/results/gpu.json

is all that a machine with one Hopper GPU needs; no network. Models have their released configurations and random
weights (as their layers initialise themselves: standard deviation ``1 / sqrt(3 K)``), so time and memory are those of
the released ones, and quality is not: SQNR here only tells that the right thing was computed.

Method: all cases of a part run in one process on one model, in turn (A B C A B C ...), so that the clock of the GPU
treats them alike. Repeated blocks are compiled one by one, as diffusers' ``compile_repeated_blocks`` does; all cases
use the same attention kernel, the first of `ATTENTION` that the model can run with. A sample is the time between two
CUDA events around one forward pass; what is compared are medians:

    speedup = median(compiled BF16 in this part) / median(case)

The part's own baseline, each time: ratios never mix two runs. ``roofline`` is what the linears and the attention alone
would take on the ceilings of `bench.fake_gpu`, each linear at ``max(FLOPs / rate, bytes / bandwidth)``; elementwise
work is not in it, so that nothing can reach 100 %.

Parts (``--part``), each planned for less than nine minutes on an H200, which nobody has measured yet:

* ``main``: eager BF16, compiled BF16, ours at both granularities and with modulation in BF16;
* ``torchao``: its dynamic FP8 quantization, row-wise and per-tensor, compiled in the same way;
* ``torchao-settings``: BF16, torchao's row-wise and ours, each under the Inductor settings that torchao recommends
  (coordinate descent tuning);
* ``autotune-bf16``, ``autotune-fp8``: ``max-autotune-no-cudagraphs`` for BF16 and for ours, the slowest to compile;
* ``cudagraphs``: ``reduce-overhead`` for BF16 and ours;
* ``passes``: ours without one pass or another;
* ``attention``: FP8 linears, FP8 attention, both, by the kernel that Inductor generates;
* ``attention-flash3``: the same by FlashAttention 3, and BF16 with it; needs the package flash_attn_interface;
* ``layers-1``, ``layers-2`` (Qwen-Image only): 13 choices of layers that stay in BF16;
* ``kernels``: the kernels of a block, measured beside what `bench.kernels` says of them (`bench.kernel_times`);
* ``gemm``: every linear's shape alone, in BF16 and FP8, and merged with those that read the same input.

``first run`` is the compilation, with whatever Inductor's cache on disk holds already. ``GB held`` and ``read`` are
weights: what the case would hold were it alone, FP8 constants beside the model's own included, and what a forward pass
reads. Infinite and undefined values are the strings "inf" and "nan" in the JSON.

What is known goes into ``--output`` after each case and each round. The same command again goes on: it runs the parts
that are not there or were not finished (interrupted, or cases were left out for ``--budget``), and moves what they held
to "earlier". Parts that were finished with failures are not run again without ``--again``, since most failures would
only repeat. A case that broke the CUDA context ends the command; the next one leaves it out. ``--budget`` and
``--stop-after`` are looked at between cases and between parts only. Exit code 1: something failed, or was left out.

``--tiny --device cpu`` runs tiny models through the same program, to try it; but for torchao, which fails on a CPU, for
CUDA graphs, and for FlashAttention 3.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fp8_compile.errors import Fp8Error
from fp8_compile.measure.results import write_whole
from fp8_compile.measure.variants import NotedBackend
from fp8_compile.recipes.qwen_image import QWEN_IMAGE_GROUPS
from fp8_compile.runtime.constants import state_of

from . import kernel_times
from .common import Spread, environment, interleave, parser, sqnr, table
from .fake_gpu import GPUS, Gpu
from .models import MODELS, TORCHAO_SETTINGS, Model, output, quantize_with_torchao

BASELINE = "compiled BF16"
ATTENTION = ("flash", "cudnn", "efficient")
PUBLISHED = {
    "qwen-image": "vllm-omni: 1.28x, 1.11x without img_mlp",
    "z-image": "vllm-omni: 1.20x",
    "flux": "torchao row-wise: 1.385x",
}


@dataclass(frozen=True)
class Case:
    """A way to run a transformer's blocks.

    Attributes:
        backend: "eager", "inductor" or "fp8_diffusion".
        options: of ``torch.compile``.
        mode: of ``torch.compile``.
        torchao: granularity of torchao's quantization, "row" or "tensor", or None.
        flash3: run with FlashAttention 3 in the place of torch's flash kernels; it must be installed.
    """

    backend: str = "fp8_diffusion"
    options: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    torchao: str | None = None
    flash3: bool = False

    @property
    def quantized(self) -> bool:
        return self.backend == "fp8_diffusion" or self.torchao is not None

    @property
    def cuda_graphs(self) -> bool:
        return self.mode in ("reduce-overhead", "max-autotune")


class BenchError(Fp8Error, RuntimeError):
    """A case that cannot be measured, or did not compute what it was meant to."""


def _keep(*patterns: str) -> Case:
    return Case(options={"ignored_layers": list(patterns)})


_ALL_LINEARS = r"re:(?<!\.sdpa)$"
_BF16 = {BASELINE: Case("inductor")}
_HALF = (len(QWEN_IMAGE_GROUPS) + 1) // 2
_KEPT = [(name, _keep(*patterns)) for name, patterns in QWEN_IMAGE_GROUPS.items()]
_LAYERS = [dict(_KEPT[:_HALF]), dict(_KEPT[_HALF:])]
PARTS: dict[str, dict[str, Case]] = {
    "main": {
        "eager BF16": Case("eager"),
        **_BF16,
        "FP8": Case(),
        "FP8, few rows kept": Case(options={"small_m": "keep"}),
        "FP8 per tensor": Case(options={"granularity": "tensor"}),
    },
    "torchao": {
        **_BF16,
        "torchao row-wise": Case("inductor", torchao="row"),
        "torchao per tensor": Case("inductor", torchao="tensor"),
        "FP8": Case(),
    },
    "torchao-settings": {
        **_BF16,
        "BF16, torchao's settings": Case("inductor", options=TORCHAO_SETTINGS),
        "torchao row-wise, its settings": Case("inductor", options=TORCHAO_SETTINGS, torchao="row"),
        "FP8, torchao's settings": Case(options=TORCHAO_SETTINGS),
    },
    # Autotuning takes longest, and no budget can stop it inside a case: one such case to a part.
    "autotune-bf16": {
        **_BF16,
        "BF16, max-autotune": Case("inductor", mode="max-autotune-no-cudagraphs"),
    },
    "autotune-fp8": {
        **_BF16,
        "FP8": Case(),
        "FP8, max-autotune": Case(mode="max-autotune-no-cudagraphs"),
    },
    "cudagraphs": {
        **_BF16,
        "BF16, reduce-overhead": Case("inductor", mode="reduce-overhead"),
        "FP8, reduce-overhead": Case(mode="reduce-overhead"),
    },
    "passes": {
        **_BF16,
        "FP8": Case(),
        "without real_rotary": Case(options={"disabled_passes": ["real_rotary"]}),
        "without rotary_pairs": Case(options={"disabled_passes": ["rotary_pairs"]}),
        "without sigmoid_gelu": Case(options={"disabled_passes": ["sigmoid_gelu"]}),
        "without one_fp8_copy": Case(options={"disabled_passes": ["one_fp8_copy"]}),
        "without whole_rows": Case(options={"disabled_passes": ["whole_rows"]}),
        "stock thresholds": Case(
            options={
                "realize_opcount_threshold": 30,
                "realize_acc_reads_threshold": 8,
            }
        ),
    },
    # FlashAttention 3 is faster in BF16 as well: what FP8 adds to that is the last line over the one before.
    "attention": {
        **_BF16,
        "FP8 linears": Case(),
        "FP8 attention by flex_attention": Case(options={"attention": "fp8", "ignored_layers": [_ALL_LINEARS]}),
        "FP8 linears and attention by flex_attention": Case(options={"attention": "fp8"}),
    },
    "attention-flash3": {
        **_BF16,
        "BF16 with FA3": Case("inductor", flash3=True),
        "FP8 linears with FA3": Case(flash3=True),
        "FP8 attention by FA3": Case(options={"attention": "fp8", "ignored_layers": [_ALL_LINEARS]}, flash3=True),
        "FP8 linears and attention by FA3": Case(options={"attention": "fp8"}, flash3=True),
    },
    "layers-1": {**_BF16, **_LAYERS[0]},
    "layers-2": {**_BF16, **_LAYERS[1]},
}
OTHER_PARTS = ("kernels", "gemm")
# The blocks of a model, as `bench.blocks` names them.
KINDS_OF_BLOCKS = {"qwen-image": ("qwen-image",), "z-image": ("z-image",), "flux": ("flux", "flux-single")}
ONLY = {"layers-1": ("qwen-image",), "layers-2": ("qwen-image",)}


class Timer:
    """Seconds of one call, by CUDA events where there is a GPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        if not self._cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


class Runner:
    """One transformer, and its blocks compiled in several ways.

    What differs between the cases is the function that a block's ``__call__`` goes to, as with ``nn.Module.compile``.
    """

    def __init__(self, name: str, tiny: bool, device: str) -> None:
        self.spec: Model = MODELS[name]
        self.device = device
        self.model, self.inputs = self.spec.build(tiny, device)
        self.blocks = self.spec.repeated_blocks(self.model)
        self._calls: dict[str, list[Any]] = {}
        self._replaced: dict[str, list[nn.Module]] = {}
        self._backends: dict[str, NotedBackend] = {}
        self.attention = self._choose_attention()
        self.linears, self.attention_flops = self._count()

    def prepare(self, name: str, case: Case) -> None:
        """Make ready what ``run(name)`` needs; compilation itself happens in the first run."""
        blocks = self.blocks
        if case.torchao is not None:
            # One at a time: a second BF16 model beside the first might not fit.
            blocks = [quantize_with_torchao(copy.deepcopy(block), case.torchao) for block in blocks]
            self._replaced[name] = blocks
        if case.backend == "eager":
            self._calls[name] = [None] * len(blocks)
            return
        arguments: dict[str, Any] = {"options": dict(case.options)} if case.options else {}
        if case.mode is not None and case.options:
            arguments["options"]["mode"] = case.mode
        elif case.mode is not None:
            arguments["mode"] = case.mode
        backend: Any = case.backend
        if backend == "fp8_diffusion":
            backend = self._backends[name] = NotedBackend()
        self._calls[name] = [
            torch.compile(block._call_impl, backend=backend, fullgraph=True, dynamic=False, **arguments)
            for block in blocks
        ]

    def run(self, name: str) -> Tensor:
        """One forward pass as ``name``."""
        for block, call in zip(self.blocks, self._calls[name], strict=True):
            block._compiled_call_impl = call  # bound to a copy of the block, where torchao has its own
        if self.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # else one block's recording frees the previous block's result
        with torch.no_grad(), _attention(self.attention, self.device):
            return output(self.model(**self.inputs))

    def forget(self, name: str) -> None:
        """Let go of what ``prepare(name)`` made, for the memory. FP8 constants stay: other cases may read them."""
        for known in (self._calls, self._replaced, self._backends):
            known.pop(name, None)  # type: ignore[attr-defined]
        for block in self.blocks:
            block._compiled_call_impl = None
        _free(self.device)

    def weight_bytes(self, name: str) -> tuple[int, int]:
        """Bytes of weights that ``name`` would hold were it the only case, and those that one forward pass reads.

        Held are the model's own weights (torchao's in place of those that it converted), and the FP8 constants that the
        graphs of ``name`` read. Constants of the other cases are on the device too, and are not counted. Read is either
        a weight or the constants made of it; both where graphs differ in what they do to it.
        """
        graphs = self.graphs(name)
        held = read = 0
        for parameter in self.model.parameters():
            state = state_of(parameter)
            told = state.decisions.items() if state is not None else ()
            decisions = [d for record, some in told if record.compile_id in graphs for d in some]
            keys = {d.scheme.constants_key() for d in decisions if d.decision == "quantized" and d.scheme is not None}
            kinds = state.constants.items() if state is not None else ()
            constants = sum(t.nbytes for (key, _), made in kinds if key in keys for t in made.tensors)
            held += parameter.nbytes + constants
            kept = not constants or any(d.decision == "unquantized" for d in decisions)
            read += constants + (parameter.nbytes if kept else 0)
        if name in self._replaced:
            own = sum(p.nbytes for block in self.blocks for p in block.parameters())
            change = sum(_nbytes(p) for block in self._replaced[name] for p in block.parameters()) - own
            held, read = held + change, read + change
        return held, read

    def graphs(self, name: str) -> frozenset[str]:
        """The graphs that ``fp8_diffusion`` compiled for ``name``, as in `fp8_compile.report`."""
        return frozenset(self._backends[name].graphs) if name in self._backends else frozenset()

    def _choose_attention(self) -> str:
        if self.device != "cuda":
            return "math"
        refused = []
        for name in ATTENTION:
            try:
                with torch.no_grad(), _attention(name, self.device):
                    self.model(**self.inputs)
                return name
            except torch.OutOfMemoryError:
                raise  # says nothing about the kernel
            except RuntimeError as error:
                _check_device(self.device, error)
                refused.append(f"{name}: {_summary(error)}")
        raise BenchError(f"no attention kernel can run {self.spec.class_name}: {'; '.join(refused)}")

    def _count(self) -> tuple[Counter[tuple[int, int, int]], int]:
        """Shapes ``(M, N, K)`` of all linears in the blocks and how often they run, and the FLOPs of attention."""
        from torch.utils.flop_counter import FlopCounterMode

        shapes: Counter[tuple[int, int, int]] = Counter()

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].numel() // args[0].shape[-1]
            shapes[rows, module.out_features, module.in_features] += 1  # type: ignore[index]

        linears = [m for block in self.blocks for m in block.modules() if isinstance(m, nn.Linear)]
        hooks = [linear.register_forward_pre_hook(note) for linear in linears]
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _attention(self.attention, self.device):
            self.model(**self.inputs)
        for hook in hooks:
            hook.remove()
        counted = counter.get_flop_counts()["Global"]
        return shapes, sum(flops for op, flops in counted.items() if "attention" in str(op))

    def roofline(self, gpu: Gpu, fp8: bool, small_m: bool, attention: bool = False) -> float:
        """Seconds of the linears and of the attention.

        Args:
            fp8: linears of at least 8 rows multiply in FP8.
            small_m: those of fewer read FP8 weights.
            attention: attention multiplies in FP8.
        """
        seconds = self.attention_flops / (gpu.fp8_flops if attention else gpu.bf16_flops)
        for (rows, n, k), count in self.linears.items():
            multiplied = fp8 and rows >= 8
            activation, weight = 1 if multiplied else 2, 1 if multiplied or (small_m and rows < 8) else 2
            moved = activation * rows * k + weight * n * k + 2 * rows * n
            rate = gpu.fp8_flops if multiplied else gpu.bf16_flops
            seconds += count * max(2 * rows * n * k / rate, moved / gpu.bandwidth)
        return seconds


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _summary(error: BaseException) -> str:
    lines = f"{type(error).__name__}: {error}".splitlines()  # of torch.compile's, the first does not tell the cause
    return " ".join(line.strip() for line in lines if line.strip())[:500]


def _nbytes(parameter: Tensor) -> int:
    names, _ = parameter.__tensor_flatten__() if hasattr(parameter, "__tensor_flatten__") else ([], None)
    return sum(getattr(parameter, name).nbytes for name in names) or parameter.nbytes


@contextlib.contextmanager
def _attention(name: str, device: str) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device != "cuda":
        yield
        return
    with sdpa_kernel(getattr(SDPBackend, f"{name.upper()}_ATTENTION")):
        yield


@contextlib.contextmanager
def _flash3(wanted: bool) -> Iterator[None]:
    """Around a measurement, not in it: activating takes a while. A graph with FP8 attention activates it, too."""
    from fp8_compile.attention import flash3

    if wanted:
        flash3.activate()
    try:
        yield
    finally:
        flash3.restore()


class DeviceLost(BenchError):
    """The CUDA context is broken: whatever runs later in this process fails too."""


def _check_device(device: str, error: BaseException) -> None:
    """Raise `DeviceLost` if the GPU refuses all work after ``error``."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except torch.OutOfMemoryError:
        return  # full, not broken
    except RuntimeError:
        raise DeviceLost(_summary(error)) from error


def run_part(
    runner: Runner,
    cases: dict[str, Case],
    rounds: int,
    budget_s: float,
    store: Callable[[dict[str, Any]], None],
    fatal: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Compile and time ``cases`` in turn; one that fails is reported with its error, never left out in silence.

    Args:
        budget_s: seconds after which no further case is compiled, and no further round begun.
        store: is given what is known so far after each case and round, since a machine may be taken away.
        fatal: cases that broke the CUDA context in an earlier process, and how; they are not tried again.

    Returns:
        "finished" is False where the budget left cases out.

    Raises:
        DeviceLost: a case broke the CUDA context; what was found before has been stored, with the case in "fatal".
    """
    timer, found, failed, skipped = Timer(runner.device), {}, {}, {}
    samples: dict[str, list[float]] = {}
    result: dict[str, Any] = {
        "finished": False,
        "cases": found,
        "failed": failed,
        "skipped": skipped,
        "fatal": dict(fatal),
        "attention": runner.attention,
    }
    reference = None
    started = time.perf_counter()

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            with _flash3(cases[name].flash3):
                return work()
        except Exception as error:  # whatever one case raises, the others are measured, and the report shows it
            failed[name] = _summary(error)
            found.pop(name, None)
            samples.pop(name, None)
            print(f"{name}: {failed[name]}", file=sys.stderr)
            try:
                _check_device(runner.device, error)
            except DeviceLost:
                result["fatal"][name] = failed[name]
                store(result)
                raise
        runner.forget(name)  # not while the error is known: its frames hold tensors
        return None

    for name, case in cases.items():
        if name in fatal:
            failed[name] = f"not tried again, since it broke the CUDA context: {fatal[name]}"
            continue
        if time.perf_counter() - started > budget_s:
            skipped[name] = f"{budget_s:.0f} s had passed"
            continue
        result["running"] = name  # so that the output tells what a machine was taken away from
        store(result)
        made = attempt(name, partial(_first_runs, runner, name, case, reference))
        if made is not None:
            out, found[name] = made
            if reference is None and not case.quantized:  # else all later ones would be compared with an FP8 result
                reference = out
            samples[name] = []
            print(f"{name}: first run {found[name]['first_run_s']:.1f} s", file=sys.stderr)
        del result["running"]
        store(result)
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > budget_s:
            break
        for name in list(samples):
            seconds = attempt(name, lambda name=name: timer(lambda: runner.run(name)))
            if seconds is not None:
                samples[name].append(seconds)
        _summarize(runner, cases, found, samples)
        store(result)
    result["finished"] = not skipped
    return result


def _first_runs(runner: Runner, name: str, case: Case, reference: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """Compile ``case``, run it until it has settled, and say what that took."""
    import fp8_compile

    begin = time.perf_counter()
    runner.prepare(name, case)
    out = runner.run(name).clone()
    _synchronize(runner.device)
    first = time.perf_counter() - begin
    # The second run settles constants. CUDA graphs are recorded once the blocks, which share code, have warmed up.
    for _ in range(6 if case.cuda_graphs else 2):
        runner.run(name)
    _synchronize(runner.device)
    if not out.isfinite().all():
        raise BenchError("the output holds NaN or Inf")
    quality = None if reference is None else sqnr(reference, out)
    if quality is not None and not 10 <= quality <= (60 if case.quantized else float("inf")):
        raise BenchError(f"SQNR of {quality:.1f} dB: not what was meant to run")
    ours = case.backend == "fp8_diffusion"
    report = fp8_compile.report(runner.model, runner.graphs(name)) if ours else None
    held, read = runner.weight_bytes(name)
    return out, {
        "first_run_s": first,
        "sqnr_db": quality,
        "weight_bytes_held": held,
        "weight_bytes_read": read,
        # A replayed CUDA graph allocates nothing: its memory stays in a pool, which no peak tells.
        "activation_peak_bytes": None if case.cuda_graphs else _peak(runner, name),
        "schemes": Counter(f"{row.scheme or 'kept'}; {row.reason}" for row in (report.layers if report else ())),
        "attention": Counter(f"{r.kernel or r.decision}; {r.reason}" for r in (report.attentions if report else ())),
    }


def _summarize(runner: Runner, cases: dict[str, Case], found: dict[str, Any], samples: dict[str, list[float]]) -> None:
    base = samples.get(BASELINE)
    gpu = next((g for g in GPUS.values() if runner.device == "cuda" and g.name in torch.cuda.get_device_name()), None)
    for name, seconds in samples.items():
        if not seconds:
            continue
        case, median = cases[name], statistics.median(seconds)
        all_fp8 = case.quantized and not case.options.get("ignored_layers")
        attention = case.options.get("attention") == "fp8"
        small_m = case.backend == "fp8_diffusion" and case.options.get("small_m") != "keep"
        found[name] |= {
            "seconds": Spread.of(seconds),
            "speedup": statistics.median(base) / median if base else None,
            "samples": list(seconds),
        }
        if gpu is not None and (all_fp8 or case.backend != "fp8_diffusion"):
            found[name]["share_of_roofline"] = runner.roofline(gpu, all_fp8, small_m, attention) / median


def _peak(runner: Runner, name: str) -> int | None:
    if runner.device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.run(name)
    _synchronize(runner.device)
    return torch.cuda.max_memory_allocated() - before


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


BURST = 20
"""Matmuls between two events."""


def run_gemms(runner: Runner, repeats: int, budget_s: float, store: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Rates of every linear's shape in BF16 and FP8, bias included, and of those with several times the outputs.

    Each runs `BURST` times on the same operands, so that a weight that fits into the second-level cache stays there,
    which it would not in a model. "launched" says how the matmuls were issued.

    Args:
        budget_s: seconds after which no further shape is begun.
        store: is given what is known so far after each shape.

    Returns:
        As of `run_part`, with "shapes" instead of "cases".
    """
    from fp8_compile.numerics import quantize_rowwise, quantize_tensorwise, scaled_linear

    timer, rows, failed, skipped = Timer(runner.device), [], {}, {}
    shapes = dict(runner.linears)
    for (m, n, k), count in runner.linears.items():
        if m >= 8 and n == k:  # q, k and v as one
            shapes.setdefault((m, 3 * n, k), 0)
        elif m >= 8 and count >= 2 * len(runner.blocks):  # the two halves of a gated MLP as one
            shapes.setdefault((m, 2 * n, k), 0)
    result: dict[str, Any] = {"finished": False, "shapes": rows, "failed": failed, "skipped": skipped}
    started = time.perf_counter()
    for (m, n, k), count in sorted(shapes.items()):
        if time.perf_counter() - started > budget_s:
            skipped[f"{m} x {n} x {k}"] = f"{budget_s:.0f} s had passed"
            continue
        x, w, b = (torch.randn(s, device=runner.device, dtype=torch.bfloat16) for s in ((m, k), (n, k), (n,)))
        work: dict[str, Callable[[], Any]] = {"bf16": lambda x=x, w=w, b=b: nn.functional.linear(x, w, b)}
        for name, quantize in (("row", quantize_rowwise), ("tensor", quantize_tensorwise)):
            if m < 8 or n % 16 or k % 16:  # the backend does not multiply these in FP8
                continue
            qx, (qw, sw) = quantize(x), quantize(w)
            for suffix, bias in (("", None), (" + bias", b)):
                work[f"fp8 {name}{suffix}"] = lambda qx=qx, qw=qw, sw=sw, bias=bias: scaled_linear(
                    qx, qw, sw, bias, torch.bfloat16
                )
        entry: dict[str, Any] = {"m": m, "n": n, "k": k, "calls_per_forward": count, "seconds": {}, "launched": {}}
        bursts: dict[str, Callable[[], float]] = {}
        for name, call in work.items():
            try:
                call()
                burst, times, how = _burst(call, runner.device)
            except (RuntimeError, ValueError) as error:
                failed[f"{m} x {n} x {k}, {name}"] = _summary(error)
                _check_device(runner.device, error)
                continue
            entry["launched"][name] = how
            bursts[name] = lambda burst=burst, times=times: timer(burst) / times
        measured = interleave(bursts, repeats)
        for name, samples in measured.items():
            entry["seconds"][name] = Spread.of(samples)
        entry["tflops"] = {name: 2e-12 * m * n * k / statistics.median(s) for name, s in measured.items()}
        rows.append(entry)
        store(result)
    result["finished"] = not skipped
    return result


_EAGER = "one by one: the host may be what is timed"


def _burst(call: Callable[[], Any], device: str) -> tuple[Callable[[], Any], int, str]:
    """Something that runs ``call`` several times, how many times, and how: as a CUDA graph where that can be.

    Launched one by one, a small matmul waits for the host, and its time would be the launch's.
    """
    if device != "cuda":
        return call, 1, "alone, on a CPU"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # handles and workspaces must be there before the recording
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context puts the stream back, which torch.cuda.graph does not if the recording fails.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            for _ in range(BURST):
                call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        _check_device(device, error)
        return lambda: [call() for _ in range(BURST)], BURST, f"{_EAGER} ({_summary(error)})"
    return graph.replay, BURST, "CUDA graph"


def show(model: str, part: str, result: dict[str, Any]) -> str:
    """One part as a table."""
    if "blocks" in result:
        return f"{model}, {part}\n{kernel_times.show(result)}"
    if "cases" not in result and "shapes" not in result:
        return "\n".join([f"{model}, {part}", *_left_out(result)])
    if part == "gemm":
        header = ["M x N x K (calls), TFLOP/s", "bf16", "fp8 row", "+ bias", "fp8 tensor", "+ bias"]
        names = ["bf16", "fp8 row", "fp8 row + bias", "fp8 tensor", "fp8 tensor + bias"]
        rows = [
            [f"{e['m']} x {e['n']} x {e['k']} ({e['calls_per_forward']})"]
            + [f"{e['tflops'][name]:.3g}" if name in e["tflops"] else "-" for name in names]
            for e in result["shapes"]
        ]
        return "\n".join([f"{model}, {part}", table(header, rows), *_left_out(result)])
    header = [
        f"{model}, {part}",
        "ms, median [quartiles]",
        "speedup",
        "first run s",
        "SQNR dB",
        "of roofline",
        "GB held",
        "read",
    ]
    rows = []
    for name, entry in result["cases"].items():
        seconds = entry.get("seconds")
        if seconds is None:  # the time was up before the first round
            continue
        spread = seconds if isinstance(seconds, Spread) else Spread(**seconds)
        share = entry.get("share_of_roofline")
        rows.append(
            [
                name,
                spread.text(1e3),
                f"{entry['speedup']:.3f}" if entry["speedup"] else "-",
                f"{entry['first_run_s']:.0f}",
                "-" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.1f}",
                f"{share:.0%}" if share else "-",
                f"{entry['weight_bytes_held'] / 1e9:.2f}",
                f"{entry['weight_bytes_read'] / 1e9:.2f}",
            ]
        )
    return "\n".join([table(header, rows), *_left_out(result), f"published: {PUBLISHED[model]}"])


def _left_out(result: dict[str, Any]) -> list[str]:
    return [f"{kind}: {name}: {why}" for kind in ("failed", "skipped") for name, why in result.get(kind, {}).items()]


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    p.add_argument("--part", nargs="+", choices=[*PARTS, *OTHER_PARTS], default=[*PARTS, *OTHER_PARTS])
    p.add_argument("--again", action="store_true", help="also run parts that the output holds, and cases that failed")
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument(
        "--budget", type=float, default=360, help="seconds after which a part starts no further case or round"
    )
    p.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which no further part begins")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--tiny", action="store_true", help="tiny models, to try the program")
    given = p.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        p.error("no CUDA GPU here; --tiny --device cpu tries the program without one")
    if given.device == "cpu" and not given.tiny:
        p.error("--device cpu is for trying the program: add --tiny")

    torch._dynamo.config.recompile_limit = 64  # every case is another entry for the same code
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    stored: dict[str, Any] = {"results": {}}
    if given.output is not None and given.output.exists():
        stored = json.loads(given.output.read_text())
    complete = True
    began = time.perf_counter()
    for name in given.only:
        for part in given.part:
            key = f"{name}/{part}"
            if name not in ONLY.get(part, (name,)):
                continue
            known = stored["results"].get(key, {})
            if known.get("finished") and not given.again:
                complete &= not known["failed"]
                print(f"{key}: in the output already" + (", with failures" if known["failed"] else ""))
                continue
            if time.perf_counter() - began > given.stop_after:
                print(f"{key}: not begun, {given.stop_after:.0f} s had passed")
                complete = False
                continue
            about = {"environment": {**environment(), "driver": _driver()}}

            def store(result: dict[str, Any], key: str = key, about: dict[str, Any] = about) -> None:
                stored["results"][key] = {**about, **result}
                if given.output is not None:
                    write_whole(given.output, json.dumps(_plain(stored), indent=1, allow_nan=False))

            if known:
                stored.setdefault("earlier", {}).setdefault(key, []).append(known)
                del stored["results"][key]
            lost = False
            try:
                fatal = {} if given.again else known.get("fatal", {})
                result = _run(name, part, given, store, fatal)
            except Exception as error:  # the other parts are measured all the same, and the output tells
                lost = isinstance(error, DeviceLost)
                # A part that fails as a whole would fail again, so it is finished; one that broke the GPU is not, where
                # the next process can leave out the case that did it.
                before = stored["results"].get(key, {})
                result = {
                    **before,
                    "finished": not (lost and before.get("fatal")),
                    "failed": {**before.get("failed", {}), "the part": _summary(error)},
                }
                traceback.print_exception(error)
            store(result)
            print(show(name, part, result), flush=True)
            complete &= result["finished"] and not result["failed"]
            if lost:
                print("the CUDA context is broken; the same command in a new process goes on")
                return 1
            _free(given.device)
    return 0 if complete else 1


def _run(
    name: str,
    part: str,
    given: argparse.Namespace,
    store: Callable[[dict[str, Any]], None],
    fatal: Mapping[str, str],
) -> dict[str, Any]:
    """One part; here and not in `main`, so that nothing of it is alive when the next one begins."""
    torch.compiler.reset()
    if part == "kernels":
        if given.device == "cpu":
            return {"finished": True, "failed": {}, "skipped": {"kernels": "a CPU has no kernels to measure"}}
        return {"finished": True, **kernel_times.run(KINDS_OF_BLOCKS[name], 4096, kernel_times.BACKENDS)}
    runner = Runner(name, given.tiny, given.device)
    if part == "gemm":
        return run_gemms(runner, given.rounds, given.budget, store)
    return run_part(runner, PARTS[part], given.rounds, given.budget, store, fatal)


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it, which has no infinity and no NaN: those become the strings "inf" and "nan"."""
    if isinstance(value, Spread):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


if __name__ == "__main__":
    sys.exit(main())
