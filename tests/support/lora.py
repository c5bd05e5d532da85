"""A small real model with LoRA adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

import fp8_compile
from tests.support.zoo import MODELS

TINY = MODELS["QwenImage"]
OPTIONS: dict[str, Any] = {"inner_backend": "aot_eager", "min_features": 64}
FLOOR = 35.0


def add(m: Any, *names: str) -> Any:
    """Adapters of a trained one's shape: its second matrix is not zero."""
    for seed, name in enumerate(names, start=1):
        targets = ["to_q", "to_out.0", "net.2"]
        m.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets, init_lora_weights=False), name)
        torch.manual_seed(seed)
        for path, p in m.named_parameters():
            if f"lora_B.{name}" in path:
                p.normal_(std=1.0)
            if "lora_" in path:
                p.data = p.data.bfloat16()
    return m


def build(*adapters: str) -> Any:
    return add(TINY.build(), *adapters)


def quantized(m: Any) -> Any:
    fp8_compile.quantize_(m, {"min_features": 64})
    return m


def run(m: nn.Module) -> Tensor:
    return TINY.output(m(**TINY.inputs(0)))


def compile_blocks(m: Any) -> None:
    m.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True, options=OPTIONS)


def uncompiled(m: nn.Module) -> Tensor:
    """What the same module gives in eager mode, with its weights as they are now."""
    calls = {block: block._compiled_call_impl for block in m.modules()}
    for block in calls:
        block._compiled_call_impl = None
    try:
        return run(m)
    finally:
        for block, call in calls.items():
            block._compiled_call_impl = call
