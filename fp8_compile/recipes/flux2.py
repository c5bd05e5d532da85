"""FLUX.2."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="FLUX.2 dev, klein",
    transformer="Flux2Transformer2DModel",
    pipeline="Flux2Pipeline",
    steps=50,
    keep=(),
    says="all layers [vllm-omni]",
    date="2026-11",
)
