"""HunyuanVideo."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="HunyuanVideo",
    transformer="HunyuanVideoTransformer3DModel",
    pipeline="HunyuanVideoPipeline",
    steps=50,
    keep=(),
    says="embedders, modulation and output in BF16 [sglang]; all linears of the blocks, weights only [tencent]",
    date="2026-11",
)
