"""FLUX.1."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="FLUX.1 dev, schnell",
    transformer="FluxTransformer2DModel",
    pipeline="FluxPipeline",
    steps=28,
    keep=(),
    says="all layers [vllm-omni]; keep modulation and projections of the MLPs [sglang]; keep embedders, `norm_out` "
    "and `proj_out` [modelopt]",
    date="2026-11",
)
