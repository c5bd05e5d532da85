"""Text encoders: what to keep in BF16 where one is converted at all."""

from __future__ import annotations

from .recipe import EncoderRecipe

_QWEN_VL = "the language model alone: the vision tower and `lm_head` stay in BF16 [3998], [7823]"
_T5 = "all but the second projection of the feed-forward, `wo` [7824]"
_CLIP = "both CLIP encoders stay as they are [7824]"

RECIPES = (
    EncoderRecipe("T5", "T5EncoderModel", ("wo",), _T5, "2026-11"),
    EncoderRecipe("UMT5 of Wan", "UMT5EncoderModel", ("wo",), _T5, "2026-11"),
    EncoderRecipe(
        "Qwen2.5-VL of Qwen-Image and others",
        "Qwen2_5_VLForConditionalGeneration",
        ("visual", "lm_head"),
        _QWEN_VL,
        "2026-11",
    ),
    EncoderRecipe("Qwen3 of Z-Image", "Qwen3Model", (), "all linears [1338]", "2026-11"),
    EncoderRecipe("CLIP", "CLIPTextModel", ("*",), _CLIP, "2026-11"),
    EncoderRecipe("CLIP with a projection", "CLIPTextModelWithProjection", ("*",), _CLIP, "2026-11"),
)
