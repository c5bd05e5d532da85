"""Qwen-Image, Qwen-Image-2512, Qwen-Image-Edit.

vLLM-Omni keeps ``img_mlp`` where quality suffers. SGLang keeps ``img_mlp.net.2``, modulation, embedders and output,
with calibrated scales; so that is a hint only.
"""

from __future__ import annotations

from .recipe import Groups, Recipe

_TEXT_KV, _TEXT_OUT, _QKV, _OUT = "add_kv_proj", "to_add_out", "to_qkv", "attn.to_out"

QWEN_IMAGE_GROUPS: Groups = {
    "all FP8": (),
    "skip text KV": (_TEXT_KV,),
    "skip text out": (_TEXT_OUT,),
    "skip text KV + out": (_TEXT_KV, _TEXT_OUT),
    "skip image QKV": (_QKV,),
    "skip image out": (_OUT,),
    "skip image QKV + out": (_QKV, _OUT),
    "skip img_mlp": ("img_mlp",),
    "skip txt_mlp": ("txt_mlp",),
    "skip both MLPs": ("img_mlp", "txt_mlp"),
    "skip all attention": (_QKV, _TEXT_KV, _OUT, _TEXT_OUT),
    "skip text stream": (_TEXT_KV, _TEXT_OUT, "txt_mlp"),
    "skip attention + txt_mlp": (_QKV, _TEXT_KV, _OUT, _TEXT_OUT, "txt_mlp"),
}
"""With compiled BF16, the 14 configurations that an ablation compares."""

RECIPE = Recipe(
    transformer="QwenImageTransformer2DModel",
    keep=("img_mlp",),
    sources=(
        "vLLM-Omni, FP8 guide: https://docs.vllm.ai/projects/vllm-omni/en/latest/user_guide/quantization/fp8/",
        "SGLang, diffusion quantization: "
        "https://github.com/sgl-project/sglang/blob/main/docs/diffusion/quantization.md",
    ),
    groups=QWEN_IMAGE_GROUPS,
)
