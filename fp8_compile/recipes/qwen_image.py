"""Qwen-Image, Qwen-Image-2512, Qwen-Image-Edit."""

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
    models="Qwen-Image, Qwen-Image-2512, Qwen-Image-Edit",
    transformer="QwenImageTransformer2DModel",
    pipeline="QwenImagePipeline",
    steps=50,
    keep=("img_mlp",),
    says="keep `img_mlp` where quality suffers [vllm-omni]; keep `img_mlp.net.2`, modulation, embedders and output "
    "[sglang]",
    date="2026-11",
    groups=QWEN_IMAGE_GROUPS,
)
