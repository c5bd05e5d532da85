"""LoRA files as a training writes them: both matrices of each layer, in BF16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TARGETS = ("attn.to_q", "attn.to_v", "attn.to_out.0", "img_mlp.net.2")


def write_lora(transformer: Any, file: Path, seed: int, rank: int, targets: tuple[str, ...] = TARGETS) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in transformer.named_modules():
        if path.endswith(targets):
            for name, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                value = torch.randn(*shape, generator=generator) / shape[1] ** 0.5
                tensors[f"transformer.{path}.lora_{name}.weight"] = value.bfloat16()
    save_file(tensors, file)
    return file
