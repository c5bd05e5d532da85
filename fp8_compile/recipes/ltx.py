"""LTX-Video."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="LTX-Video",
    transformer="LTXVideoTransformer3DModel",
    pipeline="LTXPipeline",
    steps=50,
    keep=(),
    says="first and last three blocks, embedders and output in BF16 [modelopt]",
    date="2026-11",
)
