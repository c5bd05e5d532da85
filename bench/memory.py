"""Memory of real models in FP8, beside BF16: what stays, what loading needs at its worst, and how fast it quantizes.

Resident bytes are exact for the real configurations, and need no memory: the models are made and quantized on the meta
device, in full depth. The peak is measured on a model of the same layers but fewer blocks, for the device that the
weights are quantized on: the most bytes that were alive there while `quantize_` ran, BF16 weights that wait on the host
not counted. A peak is made of what stays and of the layer at work, so that the same excess holds for any depth. Speed
is that of the largest layer alone, in bytes read and written.

On a GPU the peak is that of its allocator. Without one, the meta device stands for it: the operators are the same, and
the storages that they return there are counted.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fp8_compile
from fp8_compile import QuantizedWeight
from fp8_compile.checks import parse_options
from fp8_compile.schemes import scheme_for

from . import models
from .common import Spread, parser, table, write

RESIDENT_TARGET = 0.55
"""Of BF16, at most, with all eligible layers in FP8."""

MODELS = {model.title: model for model in models.MODELS.values()}


@dataclass(frozen=True)
class Memory:
    """Bytes of one model; ``ratio`` is FP8 over BF16, ``excess`` the load peak minus what stays, ``layer`` BF16's."""

    model: str
    bf16: int
    fp8: int
    ratio: float
    excess: int
    layer: int

    @property
    def peak(self) -> int:
        return self.fp8 + self.excess


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages on a device that operators return inside, as long as they live."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {s._cdata for s in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = storage._cdata
            if storage.device.type == self.device and key not in before and key not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, storage.nbytes()).atexit = False
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> list[Any]:
    plain = [t for t in tree_leaves(tree) if isinstance(t, Tensor) and not isinstance(t, QuantizedWeight)]
    return [t.untyped_storage() for t in plain]


def build(name: str, device: str, small: bool) -> nn.Module:
    import diffusers

    spec = MODELS[name]
    config = {**spec.released.config, **(spec.shallow if small else {})}
    with torch.device(device):
        model: nn.Module = getattr(diffusers, spec.class_name)(**config).bfloat16()
    return model


def resident(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def measure(name: str) -> Memory:
    """See the module."""
    model = build(name, "meta", small=False)
    bf16 = resident(model)
    fp8_compile.quantize_(model)
    fp8 = resident(model)
    sample = build(name, "cpu", small=True)
    layer = max(m.weight.nbytes for m in sample.modules() if isinstance(m, nn.Linear))
    return Memory(name, bf16, fp8, fp8 / bf16, _excess(sample), layer)


def _excess(model: nn.Module) -> int:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fp8_compile.quantize_(model, device="cuda")
        return torch.cuda.max_memory_allocated() - before - resident(model)
    with patch("fp8_compile.quantize.check_device"), Alive("meta") as alive:
        fp8_compile.quantize_(model, device="meta")
    return alive.peak - resident(model)


def speed(rounds: int) -> dict[str, float]:
    """GB/s, read and written, of quantizing a weight of Qwen-Image's MLP, beside those of copying it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(12288, 3072, device=device).bfloat16()
    moved = {"quantize": 3 * weight.numel(), "copy": 4 * weight.numel()}
    works = {"quantize": lambda: QuantizedWeight.quantize(weight, scheme_for(parse_options({}))), "copy": weight.clone}
    found = {}
    for name, work in works.items():
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found[name] = moved[name] / Spread.of(seconds).median / 1e9
    return found


def show(results: Sequence[Memory]) -> str:
    header = ("model", "BF16 GB", "FP8 GB", "ratio", "peak GB", "excess MB", "largest layer MB")
    rows = [
        (
            r.model,
            *(f"{size / 1e9:.2f}" for size in (r.bf16, r.fp8)),
            f"{r.ratio:.3f}",
            f"{r.peak / 1e9:.2f}",
            *(f"{size / 1e6:.0f}" for size in (r.excess, r.layer)),
        )
        for r in results
    ]
    return table(header, rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--rounds", type=int, default=5, help="measurements of the speed")
    given = arguments.parse_args()
    results = [measure(name) for name in given.models]
    found = speed(given.rounds)
    print(show(results))
    targets = {
        f"resident at most {RESIDENT_TARGET} of BF16": all(r.ratio <= RESIDENT_TARGET for r in results),
        "load peak at most one layer above resident": all(r.excess <= r.layer for r in results),
    }
    for target, met in targets.items():
        print(f"{target}: {'met' if met else 'missed'}")
    print(f"quantizing {found['quantize']:.1f} GB/s, copying {found['copy']:.1f} GB/s")
    write(given.output, {"memory": [{**asdict(r), "peak": r.peak} for r in results], "gb_per_s": found})


if __name__ == "__main__":
    main()
