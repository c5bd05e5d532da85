"""LTX-2."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="LTX-2",
    transformer="LTX2VideoTransformer3DModel",
    pipeline="LTX2Pipeline",
    steps=30,
    keep=(),
    says="all layers [vllm-omni]; first and last three blocks, embedders and output in BF16 [modelopt]",
    date="2026-11",
)
