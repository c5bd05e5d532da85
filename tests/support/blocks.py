"""A small transformer of equal blocks, quick to compile, for tests of what is the same for every model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 64
LOAD: dict[str, Any] = {"min_features": WIDTH}
OPTIONS: dict[str, Any] = {"inner_backend": "aot_eager", **LOAD}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH)
        self.img_mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, (WIDTH,))
        return x + self.img_mlp(self.to_q(normed) * self.to_k(normed))


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def compile_blocks(self, **options: Any) -> Model:
        for block in self.blocks:
            block.compile(backend="fp8_diffusion", fullgraph=True, options={**OPTIONS, **options})
        return self

    def compile_whole(self, **options: Any) -> Model:
        self.compile(backend="fp8_diffusion", fullgraph=True, options={**OPTIONS, **options})
        return self


def model(blocks: int = 3) -> Model:
    return Model(blocks).bfloat16().eval()


def tokens(count: int = 32) -> Tensor:
    return torch.randn(1, count, WIDTH, dtype=torch.bfloat16)
