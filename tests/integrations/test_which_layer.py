"""Patterns hold, and kept layers stay, with what other libraries do to a model: caches, offloading, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import cache_dit
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import Tensor, nn

import fp8_compile
from bench.tiny import build_qwen_image
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

pytestmark = pytest.mark.pipeline

CPU = torch.device("cpu")
TINY = MODELS["Flux"]
LOAD: dict[str, Any] = {"min_features": 16}
OPTIONS: dict[str, Any] = {"inner_backend": "aot_eager", **LOAD}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        yield


def run(m: Any) -> Tensor:
    return TINY.output(m(**TINY.inputs(0)))


def unquantized(m: nn.Module) -> dict[str, str]:
    return {row.path: row.reason for row in fp8_compile.report(m).layers if row.decision == "unquantized"}


def quantized(m: nn.Module) -> set[str]:
    return {name for name, p in m.named_parameters() if isinstance(p, fp8_compile.QuantizedWeight)}


# --- offloading, compiled from BF16 ---


def sequentially(m: Any) -> None:
    accelerate.cpu_offload(m, execution_device=CPU, offload_buffers=True)


def dispatched(m: Any) -> None:
    accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True)


def by_leaves(m: Any) -> None:
    m.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def by_blocks(m: Any) -> None:
    m.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [sequentially, dispatched, by_leaves, by_blocks])
@pytest.mark.parametrize("pattern", ["attn", pytest.param("transformer_blocks.0.*", marks=pytest.mark.slow)])
def test_offloading(offload: Callable[[Any], None], pattern: str) -> None:
    plain = TINY.build()
    m = copy.deepcopy(plain)
    plain.compile_repeated_blocks(backend="fp8_diffusion", options={**OPTIONS, "ignored_layers": [pattern]})
    expected = run(plain)
    offload(m)
    m.compile_repeated_blocks(backend="fp8_diffusion", options={**OPTIONS, "ignored_layers": [pattern]})
    assert sqnr(expected, run(m)) > 50
    assert sqnr(expected, run(m)) > 50


# --- step caches ---


def no_cache(pipe: Any) -> None:
    pass


def first_block_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))


def dual_block_cache(pipe: Any) -> None:
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=50.0
    )
    cache_dit.enable_cache(pipe, cache_config=config)


@pytest.mark.parametrize("cache", [no_cache, first_block_cache, dual_block_cache])
@pytest.mark.parametrize(("pattern", "count"), [("img_mlp", 4), ("transformer_blocks.0.*", 14)])
def test_step_caches(cache: Callable[[Any], None], pattern: str, count: int, recwarn: pytest.WarningsRecorder) -> None:
    pipe = build_qwen_image()
    pipe.set_progress_bar_config(disable=True)
    cache(pipe)
    pipe.transformer.compile(backend="fp8_diffusion", options={**OPTIONS, "ignored_layers": [pattern]})
    pipe("a red circle", num_inference_steps=3, height=64, width=64, true_cfg_scale=1.0, output_type="latent")
    report = fp8_compile.report(pipe.transformer)
    by_name = [row.path for row in report.layers if row.reason == f"ignored_layers: {pattern}"]
    assert len(by_name) == count
    assert report.totals["quantized"] > 10
    assert report.unmatched_patterns == ()
    assert not [w for w in recwarn if issubclass(w.category, fp8_compile.UnmatchedPatternWarning)]


# --- after quantize_ ---


def adapters(m: Any, **config: Any) -> Any:
    targets = ["to_q", "to_out.0", "net.2"]
    m.add_adapter(LoraConfig(r=16, target_modules=targets, init_lora_weights=False, **config), "a")
    for path, parameter in m.named_parameters():
        if "lora_" in path:
            parameter.data = parameter.data.bfloat16()
    return m


def fused_qkv(m: Any, folder: Path) -> Any:
    m.fuse_qkv_projections()
    return m


def fused_and_unfused(m: Any, folder: Path) -> Any:
    m.fuse_qkv_projections()
    m.unfuse_qkv_projections()
    return m


def lora(m: Any, folder: Path) -> Any:
    return adapters(m)


def dora(m: Any, folder: Path) -> Any:
    return adapters(m, use_dora=True)


def lora_fused(m: Any, folder: Path) -> Any:
    adapters(m).fuse_lora()
    return m


def lora_deleted(m: Any, folder: Path) -> Any:
    adapters(m).delete_adapters("a")
    return m


def ema(m: Any, folder: Path) -> Any:
    average = EMAModel(m.parameters())
    average.step(m.parameters())
    average.copy_to(m.parameters())
    return m


def saved(m: Any, folder: Path) -> Any:
    m.save_pretrained(folder)
    return type(m).from_pretrained(folder, dtype=torch.bfloat16)


def offloaded_by_leaves(m: Any, folder: Path) -> Any:
    by_leaves(m)
    return m


def offloaded_sequentially(m: Any, folder: Path) -> Any:
    sequentially(m)
    return m


@pytest.mark.parametrize(
    "act",
    [
        fused_qkv,
        fused_and_unfused,
        lora,
        dora,
        lora_fused,
        lora_deleted,
        ema,
        saved,
        pytest.param(offloaded_by_leaves, marks=pytest.mark.slow),
        offloaded_sequentially,
    ],
)
def test_what_was_kept_stays_kept(act: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    m = TINY.build()
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["attn"]})
    m = act(m, tmp_path)
    m.compile_repeated_blocks(backend="fp8_diffusion", options={"inner_backend": "aot_eager"})
    run(m)
    run(m)
    rows = [row for row in fp8_compile.report(m).layers if "attn" in row.path.split(".")]
    assert {row.decision for row in rows} == {"unquantized"}
    assert {row.reason for row in rows} <= {
        "ignored_layers: attn",
        "low-rank adapter",
        "in no graph that the backend compiled",
    }
    assert sum(row.reason == "ignored_layers: attn" for row in rows) >= 20


def test_dequantizing_forgets_what_was_asked(tmp_path: Path) -> None:
    m = TINY.build()
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["attn"]})
    m.compile_repeated_blocks(backend="fp8_diffusion", options={"inner_backend": "aot_eager"})
    run(m)
    m.dequantize()
    assert "quantization_config" not in m.config
    m.save_pretrained(tmp_path / "plain")
    again = type(m).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert not any(isinstance(p, fp8_compile.QuantizedWeight) for p in again.parameters())

    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["ff"]})
    assert m.config.quantization_config.ignored_layers == ["ff"]
    m.compile_repeated_blocks(backend="fp8_diffusion", options={"inner_backend": "aot_eager"})
    run(m)
    run(m)
    assert {reason for path, reason in unquantized(m).items() if "transformer_blocks" in path} == {"ignored_layers: ff"}
    m.save_pretrained(tmp_path / "fp8")
    again = type(m).from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    assert quantized(again) == quantized(m)
    assert unquantized(again).items() >= {p: r for p, r in unquantized(m).items() if r == "ignored_layers: ff"}.items()


def test_the_configuration_holds_the_patterns_of_all_conversions() -> None:
    m = TINY.build()
    fp8_compile.quantize_(m.transformer_blocks, LOAD)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["single_transformer_blocks.0"]})
    fp8_compile.quantize_(m, LOAD) if unquantized(m) == {} else None
    assert m.config.quantization_config.ignored_layers == ["single_transformer_blocks.0"]
