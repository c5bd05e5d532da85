"""Z-Image, Z-Image-Turbo."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="Z-Image, Z-Image-Turbo",
    transformer="ZImageTransformer2DModel",
    pipeline="ZImagePipeline",
    steps=50,
    keep=(),
    says="all layers in FP8 [vllm-omni], [sglang], [1764]; under a strict quality gate, the last 15 blocks in BF16 "
    "[3929]",
    date="2026-11",
)
