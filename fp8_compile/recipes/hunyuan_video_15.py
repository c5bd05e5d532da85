"""HunyuanVideo-1.5, whose transformer is another class than HunyuanVideo's."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="HunyuanVideo-1.5",
    transformer="HunyuanVideo15Transformer3DModel",
    pipeline="HunyuanVideo15Pipeline",
    steps=50,
    keep=(),
    says="all layers [vllm-omni]; attention and MLPs, with calibrated scales [2920]",
    date="2026-11",
)
