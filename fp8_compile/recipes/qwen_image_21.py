"""Qwen-Image-2.1, whose transformer is another class than Qwen-Image's."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="Qwen-Image-2.1",
    transformer="QwenImage21Transformer2DModel",
    pipeline="QwenImage21Pipeline",
    steps=40,
    keep=("img_mlp",),
    says="keep `img_mlp` for best fidelity, though all layers work [vllm-omni]",
    date="2026-11",
)
