"""Stable Diffusion 3.5."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="Stable Diffusion 3.5",
    transformer="SD3Transformer2DModel",
    pipeline="StableDiffusion3Pipeline",
    steps=28,
    keep=(),
    says="nothing found for scales computed while the model runs; with calibrated ones, embedders and output in "
    "BF16 [modelopt]",
    date="2026-11",
)
