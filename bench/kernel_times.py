"""What the kernels of a block take on a GPU, beside what `bench.kernels` says of them.

Method: each block of `bench.blocks`, at the size of the released model and with random weights, is compiled in several
ways. After warming up, ``torch.profiler`` records the kernels of some calls. Their mean times are summed by kind: what
Inductor generated, matmuls, attention, the rest. A second process lowers the same blocks for the same GPU with
`bench.kernels`, and its figures stand beside the measured ones.

    python -m bench.kernel_times --model qwen-image --output bench/results/kernel_times.json

`bench.gpu` runs this as its part ``kernels``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .blocks import BLOCKS, make
from .common import parser, table, write
from .models import quantize_with_torchao

KINDS = ("matmul", "attention", "generated", "rest")
BACKENDS = ("inductor", "torchao-row", "fp8_diffusion")
CALLS = 10

# Names of kernels: Inductor's; FlashAttention, cuDNN and memory-efficient attention; cuBLASLt and CUTLASS.
_GENERATED = re.compile(r"^triton_")
_ATTENTION = re.compile(r"flash|fmha|sdpa|attention", re.I)
_MATMUL = re.compile(r"gemm|nvjet|cutlass|cublas|splitk|xmma", re.I)


def kind(kernel: str) -> str:
    """Which of `KINDS` a kernel of this name is."""
    for name, pattern in (("generated", _GENERATED), ("attention", _ATTENTION), ("matmul", _MATMUL)):
        if pattern.search(kernel):
            return name
    return "rest"


def split(kernels: dict[str, float]) -> dict[str, float]:
    """The times of ``kernels``, summed by kind."""
    total: Counter[str] = Counter(dict.fromkeys(KINDS, 0.0))
    for name, us in kernels.items():
        total[kind(name)] += us
    return dict(total)


def measure(model: str, tokens: int, backend: str) -> dict[str, float]:
    """Microseconds of each kernel in one call of a block, by its name; a mean of `CALLS` calls."""
    torch._dynamo.reset()
    block, arguments = make(model, tokens)
    torch.manual_seed(0)
    given = [value for value in pytree.tree_leaves(arguments) if isinstance(value, Tensor)]
    for value in (*block.parameters(), *given):
        value.copy_(torch.randn(value.shape, dtype=value.dtype, device=value.device) * 0.05)
    if backend.startswith("torchao-"):
        quantize_with_torchao(block, backend.removeprefix("torchao-"))
    name = "fp8_diffusion" if backend == "fp8_diffusion" else "inductor"
    compiled = torch.compile(block, backend=name, fullgraph=True, dynamic=False)
    for _ in range(3):
        compiled(**arguments)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            compiled(**arguments)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        times[event.key] += event.self_device_time_total / CALLS
    return dict(times)


def modelled(models: Sequence[str], tokens: int, backends: Sequence[str], device: str) -> list[dict[str, Any]]:
    """The results of `bench.kernels`; a process of its own, since it replaces internals of torch."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "kernels.json")
        command = [sys.executable, "-m", "bench.kernels", "--model", *models, "--backend", *backends]
        command += ["--tokens", str(tokens), "--device", device, "--output", str(output)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        results: list[dict[str, Any]] = json.loads(output.read_text())["results"]
        return results


def run(models: Sequence[str], tokens: int, backends: Sequence[str]) -> dict[str, Any]:
    """Both figures of all blocks; with ``failed``, what a block could not be measured for."""
    name = torch.cuda.get_device_name()
    device = next((key for key in ("h200", "h100", "b200") if key.upper() in name), "h100")
    found: dict[str, Any] = {"modelled_for": device, "blocks": [], "failed": {}}
    for said in modelled(models, tokens, backends, device):
        model, backend = said["model"], said["backend"]
        by_kind = {"generated": said["generated_us"], **{k: said[f"{k}_us"] for k in KINDS if k != "generated"}}
        try:
            with torch.no_grad():
                kernels = measure(model, tokens, backend)
        except Exception as error:  # the other blocks are measured all the same
            found["failed"][f"{model}, {backend}"] = f"{type(error).__name__}: {error}"[:500]
            continue
        block = {"model": model, "backend": backend, "modelled_us": by_kind, "measured_us": split(kernels)}
        found["blocks"].append({**block, "kernels_us": kernels})
    return found


def show(result: dict[str, Any]) -> str:
    """A row for each block and way: modelled and measured microseconds of each kind, and of all."""
    rows = []
    for block in result["blocks"]:
        pairs = [(block["modelled_us"][k], block["measured_us"][k]) for k in KINDS]
        pairs.append((sum(m for m, _ in pairs), sum(m for _, m in pairs)))
        rows.append([f"{block['model']}, {block['backend']}", *(f"{said:.0f} / {took:.0f}" for said, took in pairs)])
    failed = [f"failed: {name}: {why}" for name, why in result["failed"].items()]
    title = f"us, modelled for {result['modelled_for']} / measured"
    return "\n".join([table([title, *KINDS, "all"], rows), *failed])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--model", nargs="+", choices=sorted(BLOCKS), default=["qwen-image"])
    made.add_argument("--tokens", type=int, default=4096, help="image tokens; the model's text tokens come on top")
    made.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    given = made.parse_args()
    if not torch.cuda.is_available():
        made.error("no CUDA GPU here; bench.kernels gives the model's figures without one")
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    result = run(given.model, given.tokens, given.backend)
    print(show(result))
    write(given.output, result)
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
