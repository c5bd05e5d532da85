"""Z-Image, Z-Image-Turbo.

All layers in FP8. Under a strict quality gate, vLLM-Omni keeps the last 15 blocks in BF16 (pull request 3929).
"""

from __future__ import annotations

from .recipe import Recipe

RECIPE = Recipe(
    transformer="ZImageTransformer2DModel",
    keep=(),
    sources=(
        "vLLM-Omni, FP8 guide: https://docs.vllm.ai/projects/vllm-omni/en/latest/user_guide/quantization/fp8/",
        "SGLang, diffusion quantization: "
        "https://github.com/sgl-project/sglang/blob/main/docs/diffusion/quantization.md",
        "vLLM-Omni, https://github.com/vllm-project/vllm-omni/pull/1764",
        "vLLM-Omni, https://github.com/vllm-project/vllm-omni/pull/3929",
    ),
)
