"""What the benchmarks share: real blocks of tiny models, interleaved rounds, statistics, tables, the JSON file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Nothing may be fetched, and imports must stay quiet: a table is all that belongs on stdout.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_TOKENS = 20
GRID = (6, 8)
"""Height and width of the image in latent patches."""


@dataclass(frozen=True)
class Spread:
    """Median of some measurements, the quartiles ``low`` and ``high``, and the ``least``, which was disturbed least."""

    median: float
    low: float
    high: float
    least: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        from fp8_compile.measure.results import quartiles

        low, median, high = quartiles(values)
        return cls(median, low, high, min(values), len(values))

    def text(self, factor: float = 1.0, digits: int = 2) -> str:
        """``median [low, high]``, each times ``factor``."""
        median, low, high = (f"{value * factor:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} [{low}, {high}]"


def interleave(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure ``cases`` in turn, A B C A B C ..., so that a slow moment of the machine meets all of them alike.

    Args:
        cases: each runs its case once and returns the measurement.
        rounds: how many times each case is measured.
    """
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, measure in cases.items():
            measured[name].append(measure())
    return measured


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """``median(numerator) / median(denominator)``."""
    return statistics.median(numerator) / statistics.median(denominator)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of ``value = c * size ** p``: the least-squares slope of ``log(value)`` over ``log(size)``."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names, the first to the left and all others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with ``--output``, described by the first paragraph of a benchmark's docstring."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    made.add_argument("--output", type=Path, help="where the JSON goes; none is written without it")
    return made


def write(output: Path | None, results: Mapping[str, Any]) -> None:
    """Write ``results`` with the `environment` beside them."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"environment": environment(), **results}, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Spread) else str(value)


def environment() -> dict[str, Any]:
    """On what, with what, when and how this process measures."""
    import torch

    gpu = torch.cuda.is_available()
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module is not None else [sys.argv[0]]
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_sources": _git("status", "--porcelain", "--", "bench/*.py", "fp8_compile").splitlines(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *program, *sys.argv[1:]]),
    }


def _cpu_name() -> str:
    return of_cpu("model name") or platform.processor() or platform.machine()


def of_cpu(field: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.split(":", 1)[1].strip()
    return ""


def sqnr(expected: Tensor, got: Tensor) -> float:
    """Signal to quantization noise, dB: infinite for equal values, NaN if either holds one."""
    signal, noise = expected.double().square().sum(), (expected.double() - got.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * (signal / noise).log10())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    here = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a borrowed machine may have none
        return ""
    return done.stdout.rstrip()


def qwen_image(blocks: int, width: int = 64) -> tuple[nn.Module, dict[str, Any]]:
    """A random BF16 `QwenImageTransformer2DModel` with two heads, and the arguments of one call of it."""
    import diffusers
    import torch

    head = width // 2
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        num_layers=blocks,
        num_attention_heads=2,
        attention_head_dim=head,
        joint_attention_dim=48,
        axes_dims_rope=(head // 4, head * 3 // 8, head * 3 // 8),
    )
    inputs = {
        "hidden_states": torch.randn(1, GRID[0] * GRID[1], 64, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 48, dtype=torch.bfloat16),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_shapes": [[(1, *GRID)]],
        "return_dict": False,
    }
    return model.bfloat16().eval(), inputs


def z_image(blocks: int, width: int) -> tuple[nn.Module, dict[str, Any]]:
    """A random BF16 `ZImageTransformer2DModel` with heads of 128, and the arguments of one call of it.

    ``width`` must be a multiple of 384: the MLP is 8/3 as wide, and FP8 takes multiples of 16.
    """
    import diffusers
    import torch

    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        dim=width,
        n_layers=blocks,
        n_refiner_layers=1,
        n_heads=width // 128,
        n_kv_heads=width // 128,
        cap_feat_dim=48,
        axes_dims=(32, 48, 48),
        axes_lens=(64, 32, 32),
    )
    inputs = {
        "x": [torch.randn(16, 1, 2 * GRID[0], 2 * GRID[1], dtype=torch.bfloat16)],
        "t": torch.tensor([0.5], dtype=torch.bfloat16),
        "cap_feats": [torch.randn(TEXT_TOKENS, 48, dtype=torch.bfloat16)],
        "return_dict": False,
    }
    return model.bfloat16().eval(), inputs


def call_of(model: nn.Module, inputs: Mapping[str, Any], block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which ``model(**inputs)`` calls its submodule ``block``."""
    import torch

    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]
