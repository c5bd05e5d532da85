"""Wan 2.2. Wan 2.1 has the same class."""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    models="Wan 2.2",
    transformer="WanTransformer3DModel",
    pipeline="WanPipeline",
    steps=50,
    keep=("attn1", "attn2"),
    says="not validated [vllm-omni]; only the MLPs in FP8, else long videos turn to noise [2920]; first and last "
    "three blocks in BF16 [modelopt]; `transformer_2` in BF16 [sglang]",
    date="2026-11",
)
