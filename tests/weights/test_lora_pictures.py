"""LoRA files on a whole pipeline in FP8, compiled: each change of the adapters shows in the next picture."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image

import fp8_compile
from bench.tiny import build_qwen_image
from fp8_compile.measure.quality import psnr
from tests.support.lora_files import write_lora

pytestmark = pytest.mark.pipeline

RANK = 8


def draw(pipe: Any) -> Image:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": generator}
    image: Image = pipe("a red circle", **arguments).images[0]
    return image


def build() -> Any:
    pipe: Any = build_qwen_image()
    pipe.set_progress_bar_config(disable=True)
    fp8_compile.quantize_(pipe.transformer)
    return pipe


def test_each_change_of_adapters_shows_in_the_next_picture(tmp_path: Path) -> None:
    """Against a twin in eager mode, which dequantizes the same FP8 weights at each use."""
    pipe, twin = build(), build()
    first, second, third = (write_lora(pipe.transformer, tmp_path / f"{i}.safetensors", i, RANK) for i in range(3))
    for one in (pipe, twin):
        one.enable_lora_hotswap(target_rank=RANK)
    options = {"inner_backend": "aot_eager"}
    pipe.transformer.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True, options=options)

    def load(file: Path, name: str, **how: Any) -> Callable[[Any], None]:
        return lambda p: p.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, **how)

    changes: dict[str, Callable[[Any], None]] = {
        "none": lambda p: None,
        "loaded": load(first, "a"),
        "weaker": lambda p: p.set_adapters("a", 0.4),
        "another file in its place": load(second, "a", hotswap=True),
        "fused": lambda p: p.fuse_lora(),
        "unfused": lambda p: p.unfuse_lora(),
        "a second one": load(third, "b"),
        "both with weights": lambda p: p.set_adapters(["a", "b"], [0.5, 1.5]),
        "unloaded": lambda p: p.unload_lora_weights(),
    }
    pictures: dict[str, Image] = {}
    for name, change in changes.items():
        change(pipe)
        change(twin)
        with torch._dynamo.config.patch(error_on_recompile=name == "another file in its place"):
            pictures[name] = draw(pipe)
        assert psnr(draw(twin), pictures[name]) > 37, name

    # In dB, measured: 41 to 45 against the twin, 38 for fused beside unfused, 16 to 23 between different adapters.
    assert pictures["unfused"] == pictures["another file in its place"]
    assert pictures["unloaded"] == pictures["none"]
    assert 30 < psnr(pictures["unfused"], pictures["fused"]) < 60
    different = [pictures[name] for name in changes if name not in ("fused", "unfused", "unloaded")]
    assert all(psnr(a, b) < 27 for a, b in combinations(different, 2))
