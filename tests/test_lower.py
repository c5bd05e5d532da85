"""What a block's code for an H200 is made of: figures of `bench.lower`, which needs no GPU.

Every lowering runs in a process of its own, because the fake GPU replaces internals of torch. The bounds lie a little
above what was measured with torch 2.11, 2.13 and 2.15: a change that moves more bytes or launches more kernels must be
meant, and one that moves fewer should lower them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
TESTED = ("2.11", "2.13", "2.15")

lowers = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not torch.__version__.startswith(TESTED),
    reason=f"bench.lower needs Triton, and torch {', '.join(TESTED)}",
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def lower(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The results in the JSON that the command writes."""
    done = python("-m", "bench.lower", *arguments, "--output", str(folder / "out.json"))
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["results"]
    return results


@dataclass(frozen=True)
class Bounds:
    """What a block may become at 4096 image tokens.

    Attributes:
        bf16, fp8: matmuls by the type of their operands.
        activations: how often something is quantized.
        launches: of Triton kernels, at most.
        megabytes: Inductor's count without views, at most.
        copied: megabytes that kernels write which only move values, at most.
        eager: what Inductor generates no code for.
    """

    bf16: int
    fp8: int
    activations: int
    launches: int
    megabytes: float
    copied: float = 0
    eager: frozenset[str] = frozenset()


COMPLEX_ROPE = frozenset({"view_as_complex", "unsqueeze", "mul.Tensor", "view_as_real"})
BOUNDS = {
    # The joint attention concatenates the values of text and image: 26 MB.
    "qwen-image": Bounds(2, 12, 8, launches=20, megabytes=1930, copied=27, eager=COMPLEX_ROPE),
    "z-image": Bounds(1, 7, 4, launches=9, megabytes=1985, eager=COMPLEX_ROPE),
    # torch 2.11 splits the amax over the concatenation: 1238 MB and 7 launches there, 1095 and 5 later.
    "flux-single": Bounds(1, 5, 2, launches=7, megabytes=1250),
}


@lowers
def test_blocks_on_an_h200(tmp_path: Path) -> None:
    """One process for all of them: starting it takes longer than lowering a block."""
    for found in lower(tmp_path, "--model", *BOUNDS):
        name, bounds = found["model"], BOUNDS[found["model"]]

        assert found["matmuls"] == {"bfloat16 -> bfloat16": bounds.bf16, "float8_e4m3fn -> bfloat16": bounds.fp8}, name
        assert [a["tensors"] for a in found["activations"]] == [1] * bounds.activations, name
        assert found["fp8_tensors"] == bounds.activations, name
        assert found["launches"] <= bounds.launches, name
        assert found["bytes"] - found["view_bytes"] <= bounds.megabytes * 1e6, name
        assert set(found["fallbacks"]) <= bounds.eager, name
        assert sum(copy["bytes"] for copy in found["copies"]) <= bounds.copied * 1e6, name


@lowers
def test_thresholds_keep_the_normalized_activation_out_of_memory(tmp_path: Path) -> None:
    """By default Inductor stores it in BF16 between the amax and the cast."""
    options = '{"realize_reads_threshold": 16, "realize_opcount_threshold": 200}'
    ours, stock = lower(tmp_path, "--model", "flux-single", "--options", options, "--diff", "inductor")

    assert ours["round_trips"] == []
    assert (stock["launches"], round(stock["bytes"] / 1e6)) == (5, 1420)


def test_another_torch_is_refused() -> None:
    program = "import torch; torch.__version__ = '2.99.0'; from bench import lower; lower.main()"
    done = python("-c", program)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("bench.lower: torch 2.99.0: bench/fake_gpu.py replaces internals")
