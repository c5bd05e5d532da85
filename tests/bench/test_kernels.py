"""Machine code of the generated kernels, for GPUs that need not be there: figures of `bench.kernels`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels
from tests.bench.test_lower import ROOT, TESTED

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not torch.__version__.startswith(TESTED),
    reason=f"bench.kernels needs Triton, and torch {', '.join(TESTED)}",
)


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The results in the JSON that the command writes, from a process of its own: internals of torch are replaced."""
    command = [sys.executable, "-m", "bench.kernels", *arguments, "--output", str(folder / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["results"]
    return results


# Microseconds that all generated kernels of a block take by the model on an H100, at most.
BOUNDS = {"qwen-image": 290, "z-image": 230, "flux": 375, "flux-single": 205}


@compiles
@pytest.mark.slow
def test_no_kernel_spills_whatever_its_configuration(tmp_path: Path) -> None:
    """About two minutes on two quiet cores."""
    found = compiled(tmp_path, "--device", "h100", "--model", *BOUNDS)
    found += compiled(tmp_path, "--device", "h100", "--model", "wan", "--tokens", "32760")
    for block in found:
        for kernel in block["kernels"]:
            assert min(c["spilled"] for c in kernel["configurations"]) == 0, (block["model"], kernel["name"])
        assert block["us"] < BOUNDS.get(block["model"], 3300), block["model"]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("device", ["rtx4090", "b200"])
def test_other_architectures(device: str, tmp_path: Path) -> None:
    """About a minute each."""
    (block,) = compiled(tmp_path, "--device", device, "--model", "z-image")
    assert all(kernel["us"] >= kernel["memory_us"] > 0 for kernel in block["kernels"])


@compiles
@pytest.mark.inductor
def test_a_pure_quantization_is_bound_by_memory(tmp_path: Path) -> None:
    (block,) = compiled(tmp_path, "--device", "h100", "--model", "flux-single")
    assert len(block["kernels"]) == 6
    quantizing = [k for k in block["kernels"] if "_scaled_mm" in k["operators"]]
    assert quantizing
    for kernel in quantizing:
        assert min(c["instructions"] for c in kernel["configurations"]) < 60
        assert kernel["us"] >= kernel["memory_us"]


LOOP = """
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   FADD R1, R4, R8 ;
        /*0040*/              @P0  BRA `(.L_x_0) ;
        /*0050*/                   STG.E [R2.64], R1 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1) ;
        /*0080*/                   NOP ;
"""
PTX = """
$L__BB0_1:
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
        @%p1 bra $L__BB0_1;
        st.global.b16 [%rd2], %rs1;
"""


def test_a_loop_counts_as_often_as_it_runs_and_less_where_it_was_unrolled() -> None:
    executed = kernels._executed(LOOP, trips=8, ptx=PTX)  # two loads where one was written
    assert executed == {"LDG": 8, "FADD": 4, "BRA": 4, "STG": 1, "EXIT": 1}
    assert kernels._executed(LOOP, trips=1, ptx=PTX)["FADD"] == 1


def test_accesses_and_resident_warps() -> None:
    loads, stores = kernels._accesses(PTX)
    assert (loads, stores) == ({16: 1}, {2: 1})
    gpu = kernels.GPUS["h100"]
    assert kernels._resident(32, 8, 0, gpu) == 64
    assert kernels._resident(255, 8, 0, gpu) == 8
    assert kernels._resident(32, 4, 100 << 10, gpu) == 8
