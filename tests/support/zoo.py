"""Tiny, randomly initialised instances of the real diffusers transformers that the tests compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

# The two resolutions, in latent patches. Both axes differ, and height, width and text length are unequal, so that
# dynamic shapes are not identified by accident. 20 is no multiple of 16 because only K and N of a linear have to be.
GRIDS = ((6, 8), (8, 11))
FRAMES = 2
TEXT = 20

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """One transformer class with a tiny config, and what stock torch 2.13 / diffusers 0.42 make of it.

    `whole_stock_failure` and `regional_stock_failure` are None where torch.compile(model, backend="aot_eager",
    fullgraph=True) and model.compile_repeated_blocks(same arguments) work at both resolutions, else the cause.

    `blocks` are diffusers' `_repeated_blocks`, or where the class has none, the classes that would be. Compiling them
    one by one makes `regional_graphs` graphs at one resolution (0: they cannot be compiled with fullgraph=True), and
    `regional_recompiles` is why some of these are recompilations, so that error_on_recompile=True does not pass (None:
    it passes). A whole model that compiles never recompiles at one resolution.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    make_inputs: Callable[[int, int], Inputs]
    blocks: tuple[str, ...]
    regional_graphs: int
    whole_stock_failure: str | None = None
    regional_stock_failure: str | None = None
    regional_recompiles: str | None = None

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = getattr(diffusers, self.class_name)(**self.config)
            for parameter in model.parameters():
                # Zero-initialised layers would hide everything computed before them.
                if not parameter.any() or not parameter.isfinite().all():
                    nn.init.normal_(parameter, std=0.02)
        return model.bfloat16().eval()

    def inputs(self, size: int) -> Inputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1 + size)
            return {**self.make_inputs(*GRIDS[size]), "return_dict": False}

    def output(self, result: Any) -> Tensor:
        sample = result[0]
        return torch.stack(sample) if isinstance(sample, list) else sample


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def _ids(h: int, w: int, axes: int) -> Tensor:
    """Position ids of the patches of one image: (0, row, column), padded with zeros to `axes`."""
    ids = torch.zeros(h, w, axes)
    ids[..., 1] = torch.arange(h)[:, None]
    ids[..., 2] = torch.arange(w)
    return ids.flatten(0, 1)


def _t(value: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.tensor([value], dtype=dtype)


def _mask(length: int = TEXT, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(1, length, dtype=dtype)


def _qwen_image(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, h * w, 64),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "timestep": _t(0.5),
        "img_shapes": [[(1, h, w)]],
    }


def _z_image(h: int, w: int) -> Inputs:
    return {"x": [_randn(16, 1, 2 * h, 2 * w)], "t": _t(0.5), "cap_feats": [_randn(TEXT, 48)]}


def _flux(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, h * w, 64),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "pooled_projections": _randn(1, 32),
        "timestep": _t(0.5),
        "guidance": _t(3.5, torch.float32),
        "img_ids": _ids(h, w, 3).bfloat16(),
        "txt_ids": torch.zeros(TEXT, 3, dtype=torch.bfloat16),
    }


def _flux2(h: int, w: int) -> Inputs:
    txt_ids = torch.zeros(1, TEXT, 4, dtype=torch.int64)
    txt_ids[..., 3] = torch.arange(TEXT)
    return {
        "hidden_states": _randn(1, h * w, 64),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "timestep": _t(0.5),
        "guidance": _t(4.0),
        "img_ids": _ids(h, w, 4).long()[None],
        "txt_ids": txt_ids,
    }


def _chroma(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, h * w, 64),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "timestep": _t(0.5),
        "img_ids": _ids(h, w, 3).bfloat16(),
        "txt_ids": torch.zeros(TEXT, 3, dtype=torch.bfloat16),
        "attention_mask": _mask(TEXT + h * w),
    }


def _sd3(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 16, 2 * h, 2 * w),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "pooled_projections": _randn(1, 32),
        "timestep": _t(500, torch.float32),
    }


def _aura_flow(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "timestep": _t(0.5),
    }


def _hidream(_: int, w: int) -> Inputs:
    # Square: any other shape is padded to the maximal resolution, so that both sizes would have as many tokens.
    return {
        "hidden_states": _randn(1, 16, 2 * w, 2 * w),
        "timesteps": _t(500, torch.float32),
        "encoder_hidden_states_t5": _randn(1, TEXT, 48),
        "encoder_hidden_states_llama3": _randn(4, 1, TEXT, 32),
        "pooled_embeds": _randn(1, 32),
    }


def _lumina2(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 16, 2 * h, 2 * w),
        "timestep": _t(0.5),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "encoder_attention_mask": _mask(),
    }


def _pixart(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "encoder_attention_mask": _mask(dtype=torch.int64),
        "timestep": _t(500, torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sana(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 32, h, w),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "encoder_attention_mask": _mask(dtype=torch.int64),
        "timestep": _t(500, torch.float32),
    }


def _wan(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 16, FRAMES, 2 * h, 2 * w),
        "timestep": _t(500, torch.int64),
        "encoder_hidden_states": _randn(1, TEXT, 48),
    }


def _ltx(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, FRAMES * h * w, 64),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "timestep": _t(500, torch.float32),
        "encoder_attention_mask": _mask(),
        "num_frames": FRAMES,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _hunyuan_video(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 16, FRAMES, 2 * h, 2 * w),
        "timestep": _t(500, torch.int64),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "encoder_attention_mask": _mask(dtype=torch.int64),
        "pooled_projections": _randn(1, 32),
        "guidance": _t(6000),
    }


def _cogvideox(h: int, w: int) -> Inputs:
    angles = torch.randn(FRAMES * h * w, 16).repeat_interleave(2, dim=1)
    return {
        "hidden_states": _randn(1, FRAMES, 16, 2 * h, 2 * w),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "timestep": _t(500, torch.int64),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _cosmos(h: int, w: int) -> Inputs:
    return {
        "hidden_states": _randn(1, 16, FRAMES, 2 * h, 2 * w),
        "timestep": _t(0.5),
        "encoder_hidden_states": _randn(1, TEXT, 48),
        "fps": 24,
    }


_NO_REPEATED_BLOCKS = "the class has no _repeated_blocks: compile_repeated_blocks raises ValueError"
_SLICED_LATER = "strides: from the second single block on, hidden_states is a slice of the joint sequence"
_TRANSPOSED_FIRST = "strides: the first block's hidden_states is the transposed output of the patch embedding"

_HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 32}

MODELS: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "QwenImage",
            "QwenImageTransformer2DModel",
            {**_HEADS, "num_layers": 3, "joint_attention_dim": 48, "axes_dims_rope": (8, 12, 12)},
            _qwen_image,
            blocks=("QwenImageTransformerBlock",),
            regional_graphs=1,
        ),
        Tiny(
            "ZImage",
            "ZImageTransformer2DModel",
            {
                "dim": 96,
                "n_layers": 3,
                "n_refiner_layers": 2,
                "n_heads": 3,
                "n_kv_heads": 3,
                "cap_feat_dim": 48,
                "axes_dims": (8, 12, 12),
                "axes_lens": (64, 32, 32),
            },
            _z_image,
            blocks=("ZImageTransformerBlock",),
            regional_graphs=3,
            regional_recompiles="token counts: refiners and main layers are one class (64, 32 and 96 tokens)",
        ),
        Tiny(
            "Flux",
            "FluxTransformer2DModel",
            {
                **_HEADS,
                "num_layers": 2,
                "num_single_layers": 3,
                "joint_attention_dim": 48,
                "pooled_projection_dim": 32,
                "guidance_embeds": True,
                "axes_dims_rope": (8, 12, 12),
            },
            _flux,
            blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
            regional_graphs=3,
            regional_recompiles=_SLICED_LATER,
        ),
        Tiny(
            "Flux2",
            "Flux2Transformer2DModel",
            {
                **_HEADS,
                "in_channels": 64,
                "num_layers": 2,
                "num_single_layers": 3,
                "joint_attention_dim": 48,
                "axes_dims_rope": (8, 8, 8, 8),
            },
            _flux2,
            blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
            regional_graphs=2,
        ),
        Tiny(
            "SD3",
            "SD3Transformer2DModel",
            {
                **_HEADS,
                "sample_size": 24,
                "num_layers": 5,
                "joint_attention_dim": 48,
                "caption_projection_dim": 64,
                "pooled_projection_dim": 32,
                "pos_embed_max_size": 16,
                "dual_attention_layers": (0, 1),
                "qk_norm": "rms_norm",
            },
            _sd3,
            blocks=("JointTransformerBlock",),
            regional_graphs=3,
            regional_stock_failure=_NO_REPEATED_BLOCKS,
            regional_recompiles="dual-attention, plain and context_pre_only blocks: one class, different submodules",
        ),
        Tiny(
            "Wan",
            "WanTransformer3DModel",
            {**_HEADS, "text_dim": 48, "ffn_dim": 192, "num_layers": 3, "rope_max_seq_len": 32},
            _wan,
            blocks=("WanTransformerBlock",),
            regional_graphs=1,
        ),
        Tiny(
            "LTXVideo",
            "LTXVideoTransformer3DModel",
            {
                **_HEADS,
                "in_channels": 64,
                "out_channels": 64,
                "num_layers": 3,
                "cross_attention_dim": 64,
                "caption_channels": 48,
            },
            _ltx,
            blocks=("LTXVideoTransformerBlock",),
            regional_graphs=1,
        ),
        Tiny(
            "HunyuanVideo",
            "HunyuanVideoTransformer3DModel",
            {
                **_HEADS,
                "num_layers": 2,
                "num_single_layers": 3,
                "num_refiner_layers": 2,
                "text_embed_dim": 48,
                "pooled_projection_dim": 32,
                "rope_axes_dim": (8, 12, 12),
            },
            _hunyuan_video,
            blocks=(
                "HunyuanVideoTransformerBlock",
                "HunyuanVideoSingleTransformerBlock",
                "HunyuanVideoPatchEmbed",
                "HunyuanVideoTokenRefiner",
            ),
            regional_graphs=5,
            regional_recompiles=_SLICED_LATER,
        ),
        Tiny(
            "Sana",
            "SanaTransformer2DModel",
            {
                **_HEADS,
                "num_layers": 3,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 32,
                "cross_attention_dim": 64,
                "caption_channels": 48,
                "sample_size": 16,
            },
            _sana,
            blocks=("SanaTransformerBlock",),
            regional_graphs=2,
            regional_stock_failure=_NO_REPEATED_BLOCKS,
            regional_recompiles=_TRANSPOSED_FIRST,
        ),
        Tiny(
            "PixArt",
            "PixArtTransformer2DModel",
            {
                **_HEADS,
                "num_layers": 3,
                "cross_attention_dim": 64,
                "caption_channels": 48,
                "sample_size": 16,
                "use_additional_conditions": False,
            },
            _pixart,
            blocks=("BasicTransformerBlock",),
            regional_graphs=2,
            regional_stock_failure=_NO_REPEATED_BLOCKS,
            regional_recompiles=_TRANSPOSED_FIRST,
        ),
        Tiny(
            "CogVideoX",
            "CogVideoXTransformer3DModel",
            {
                **_HEADS,
                "num_layers": 3,
                "time_embed_dim": 64,
                "text_embed_dim": 48,
                "max_text_seq_length": TEXT,
                "use_rotary_positional_embeddings": True,
            },
            _cogvideox,
            blocks=("CogVideoXBlock",),
            regional_graphs=2,
            regional_stock_failure=_NO_REPEATED_BLOCKS,
            regional_recompiles="strides: the first block's hidden_states is a slice of the joint embedding",
        ),
        Tiny(
            "Lumina2",
            "Lumina2Transformer2DModel",
            {
                "sample_size": 16,
                "hidden_size": 64,
                "num_layers": 3,
                "num_refiner_layers": 2,
                "num_attention_heads": 2,
                "num_kv_heads": 1,
                "multiple_of": 32,
                "axes_dim_rope": (8, 12, 12),
                "axes_lens": (64, 32, 32),
                "cap_feat_dim": 48,
            },
            _lumina2,
            blocks=("Lumina2TransformerBlock",),
            regional_graphs=3,
            whole_stock_failure="UserError: text length read off the mask (attention_mask.sum(dim=1).tolist())",
            regional_stock_failure=_NO_REPEATED_BLOCKS,
            regional_recompiles="token counts: refiners and main layers are one class (48, 20 and 68 tokens)",
        ),
        Tiny(
            "Chroma",
            "ChromaTransformer2DModel",
            {
                **_HEADS,
                "num_layers": 2,
                "num_single_layers": 3,
                "joint_attention_dim": 48,
                "axes_dims_rope": (8, 12, 12),
                "approximator_num_channels": 64,
                "approximator_hidden_dim": 64,
                "approximator_layers": 2,
            },
            _chroma,
            blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
            regional_graphs=2,
        ),
        Tiny(
            "AuraFlow",
            "AuraFlowTransformer2DModel",
            {
                **_HEADS,
                "sample_size": 24,
                "num_mmdit_layers": 2,
                "num_single_dit_layers": 3,
                "joint_attention_dim": 48,
                "caption_projection_dim": 64,
                "pos_embed_max_size": 256,
            },
            _aura_flow,
            blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
            regional_graphs=2,
            regional_stock_failure=_NO_REPEATED_BLOCKS,
        ),
        Tiny(
            "HiDreamImage",
            "HiDreamImageTransformer2DModel",
            {
                **_HEADS,
                "patch_size": 2,
                "in_channels": 16,
                "num_layers": 2,
                "num_single_layers": 2,
                "caption_channels": (48, 32),
                "text_emb_dim": 32,
                "num_routed_experts": 4,
                "num_activated_experts": 2,
                "axes_dims_rope": (16, 8, 8),
                "max_resolution": (32, 32),
                "llama_layers": (0, 1, 2, 3),
            },
            _hidream,
            blocks=("HiDreamImageTransformerBlock", "HiDreamImageSingleTransformerBlock"),
            regional_graphs=0,
            whole_stock_failure="UserError: moe_infer loops over the bincount() of the routed tokens",
            regional_stock_failure=_NO_REPEATED_BLOCKS + "; and as for the whole model",
        ),
        Tiny(
            "Cosmos",
            "CosmosTransformer3DModel",
            {
                **_HEADS,
                "num_layers": 3,
                "text_embed_dim": 48,
                "adaln_lora_dim": 32,
                "max_size": (4, 32, 32),
                "concat_padding_mask": False,
            },
            _cosmos,
            blocks=("CosmosTransformerBlock",),
            regional_graphs=1,
            regional_stock_failure=_NO_REPEATED_BLOCKS,
        ),
    )
}
