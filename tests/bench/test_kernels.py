"""Machine code of the generated kernels, for GPUs that need not be there: figures of `bench.kernels`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernel_times, kernels
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
BOUNDS = {"qwen-image": 260, "z-image": 230, "flux": 280, "flux-single": 175, "wan": 2950}


@compiles
@pytest.mark.slow
def test_no_kernel_spills_and_all_take_as_long_as_they_did(tmp_path: Path) -> None:
    """About two minutes on two quiet cores. One configuration of each kernel does not spill; Inductor chooses it."""
    found = compiled(tmp_path, "--device", "h100", "--model", *(name for name in BOUNDS if name != "wan"))
    found += compiled(tmp_path, "--device", "h100", "--model", "wan", "--tokens", "32760")
    for block in found:
        for kernel in block["kernels"]:
            assert min(c["spilled"] for c in kernel["configurations"]) == 0, (block["model"], kernel["name"])
        assert block["generated_us"] < BOUNDS[block["model"]], block["model"]
        assert block["in_8_bits"] == 1


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("disabled", "model", "gain"), [("sigmoid_gelu", "qwen-image", 25), ("rotary_pairs", "flux", 50)]
)
def test_a_pass_saves_microseconds(disabled: str, model: str, gain: float, tmp_path: Path) -> None:
    """About a minute each."""
    (with_it,) = compiled(tmp_path, "--device", "h100", "--model", model)
    options = json.dumps({"disabled_passes": [disabled]})
    (without,) = compiled(tmp_path, "--device", "h100", "--model", model, "--options", options)
    assert without["generated_us"] - with_it["generated_us"] > gain


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("device", ["rtx4090", "b200", "rtx5090"])
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


def test_library_kernels_are_at_their_ceilings() -> None:
    """Bound by arithmetic, then by memory; attention at a rate of its own."""
    gpu = kernels.GPUS["h100"]
    matmul = kernels.Kernel("matmul", "mm", 1, 10**12, (1, 1, 1), "bfloat16 -> bfloat16")
    assert kernels._library_us(matmul, "h100") == pytest.approx(1e18 / gpu.bf16_flops)
    fp8 = dataclasses.replace(matmul, dtypes="float8_e4m3fn -> bfloat16")
    assert kernels._library_us(fp8, "h100") == pytest.approx(1e18 / gpu.fp8_flops)
    attention = dataclasses.replace(matmul, kind="attention", dtypes="")
    assert kernels._library_us(attention, "h100") == pytest.approx(1e18 / kernels.ATTENTION["h100"])
    assert kernels._library_us(attention, "b200") == pytest.approx(1e18 / kernels.GPUS["b200"].bf16_flops)
    copy = kernels.Kernel("eager", "copy_", 3 * 10**9)
    assert kernels._library_us(copy, "h100") == pytest.approx(1000)


# As torch's profiler names them on a Hopper GPU.
NAMES = {
    "triton_per_fused__scaled_mm_amax_view_3": "generated",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4> >": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_128x128x128": "attention",
    "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT": "matmul",
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128": "matmul",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GemmUniversal> >": "matmul",
    "Memcpy DtoD (Device -> Device)": "rest",
    "void at::native::vectorized_elementwise_kernel<4, MulFunctor<c10::complex<float>>>": "rest",
}


def test_kinds_of_kernels() -> None:
    assert {name: kernel_times.kind(name) for name in NAMES} == NAMES
    assert kernel_times.split({"triton_poi_0": 1.5, "nvjet_x": 2, "nvjet_y": 3}) == {
        "matmul": 5,
        "attention": 0,
        "generated": 1.5,
        "rest": 0,
    }


def test_measured_beside_modelled() -> None:
    said = {"matmul": 10.0, "attention": 20.0, "generated": 5.0, "rest": 0.0}
    block = {"model": "flux", "backend": "inductor", "modelled_us": said, "measured_us": {**said, "rest": 2.0}}
    text = kernel_times.show({"modelled_for": "h100", "blocks": [block], "failed": {"wan, inductor": "no memory"}})
    assert "flux, inductor" in text
    assert "35 / 37" in text
    assert "failed: wan, inductor: no memory" in text


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


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "instruction"),
    [
        ("h200", "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        ("rtx4090", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
        ("rtx5090", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
    ],
)
def test_flex_attention_multiplies_in_fp8(device: str, instruction: str) -> None:
    """Triton compiles the kernel, to instructions of tensor cores that take E4M3."""
    code = f"""
from bench.kernels import attention_instructions
from bench.lower import lower

print(*attention_instructions(lower("flux-single", 4096, "fp8_diffusion", {{"attention": "fp8"}}, "{device}")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert instruction in done.stdout.split()
