"""Tiny configs and inputs for the transformers of diffusers that `tests.support.zoo` leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.zoo import FRAMES, GRIDS, TEXT, Inputs, _ids, _mask, _randn, _t

H, W = GRIDS[0]
WIDTH = 64
AUDIO = 24


@dataclass(frozen=True)
class Sample:
    """A tiny config of one class, and what its forward is called with.

    Attributes:
        blocks: class names of the blocks that are compiled one by one where the class has no ``_repeated_blocks``;
            empty: those in the model's lists of modules.
        apart: patterns of layers that both entrances are asked to keep before their bits are compared, since one of
            them cannot convert there what the other does; of the whole model.
        apart_in_blocks: the same, block by block.
    """

    config: Mapping[str, Any]
    make_inputs: Callable[[], Inputs]
    blocks: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    apart_in_blocks: tuple[str, ...] = ()


_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32}
_ROPE = (8, 12, 12)


def _text(width: int = WIDTH, length: int = TEXT) -> Tensor:
    return _randn(1, length, width)


def _image(channels: int = 16) -> Tensor:
    return _randn(1, channels, 2 * H, 2 * W)


def _video(channels: int = 16, frames: int = FRAMES) -> Tensor:
    return _randn(1, channels, frames, 2 * H, 2 * W)


def _step() -> Tensor:
    return _t(500, torch.int64)


def _rope(tokens: int, width: int = 32) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, width // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


# --- images ---


def _packed_image() -> Inputs:
    """As Flux takes it."""
    return {
        "hidden_states": _randn(1, H * W, 64),
        "encoder_hidden_states": _text(),
        "timestep": _t(0.5),
        "img_ids": _ids(H, W, 3).bfloat16(),
        "txt_ids": torch.zeros(TEXT, 3, dtype=torch.bfloat16),
    }


def _bria_fibo() -> Inputs:
    return {
        **_packed_image(),
        "encoder_hidden_states": _text(128),
        "text_encoder_layers": [_text() for _ in range(4)],
    }


def _bria_fibo_2() -> Inputs:
    return {"hidden_states": _image(), "timestep": _t(0.5), "encoder_hidden_states": _randn(1, 2, TEXT, WIDTH)}


def _flux_3() -> Inputs:
    txt_ids = torch.zeros(TEXT, 4)
    txt_ids[:, 3] = torch.arange(TEXT)
    return {**_packed_image(), "img_ids": _ids(H, W, 4), "txt_ids": txt_ids}


def _cogview() -> Inputs:
    size = torch.tensor([[16.0 * H, 16.0 * W]], dtype=torch.bfloat16)
    return {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "timestep": _step(),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def _glm_image() -> Inputs:
    inputs = _cogview()
    del inputs["original_size"]
    tokens = torch.randint(64, (1, H * W))
    return {**inputs, "prior_token_id": tokens, "prior_token_drop": torch.zeros_like(tokens, dtype=torch.bool)}


def _dit() -> Inputs:
    return {"hidden_states": _randn(1, 4, 16, 16), "timestep": _step(), "class_labels": torch.tensor([3])}


def _unpatched() -> Inputs:
    return {"hidden_states": _randn(1, 64, H, W), "encoder_hidden_states": _text()}


def _frames_of_images() -> Inputs:
    return {"hidden_states": _randn(FRAMES, 64, H, W), "num_frames": FRAMES}


def _ernie_image() -> Inputs:
    return {"hidden_states": _image(), "timestep": _t(500), "text_bth": _text(), "text_lens": torch.tensor([TEXT])}


def _hunyuan_dit() -> Inputs:
    return {
        "hidden_states": _image(4),
        "timestep": _t(500),
        "encoder_hidden_states": _text(length=16),
        "text_embedding_mask": _mask(16, torch.int64),
        "encoder_hidden_states_t5": _text(length=16),
        "text_embedding_mask_t5": _mask(16, torch.int64),
        "image_meta_size": torch.tensor([[1024.0, 1024, 192, 256, 0, 0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": _rope(H * W),
    }


def _hunyuan_image() -> Inputs:
    return {
        "hidden_states": _randn(1, 64, H, W),
        "timestep": _t(500),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask(dtype=torch.int64),
        "encoder_hidden_states_2": _text(length=12),
        "encoder_attention_mask_2": _mask(12, torch.int64),
    }


def _ideogram() -> Inputs:
    from diffusers.models.transformers import transformer_ideogram4 as module

    tokens = TEXT + H * W
    positions = torch.arange(TEXT)[:, None].expand(-1, 3)
    images = _ids(H, W, 3).long() + module.IMAGE_POSITION_OFFSET
    indicator = torch.full((1, tokens), module.OUTPUT_IMAGE_INDICATOR)
    indicator[:, :TEXT] = module.LLM_TOKEN_INDICATOR
    hidden_states, encoder_hidden_states = _randn(1, tokens, WIDTH), _randn(1, tokens, WIDTH)
    hidden_states[:, :TEXT] = 0
    encoder_hidden_states[:, TEXT:] = 0
    return {
        "hidden_states": hidden_states,
        "encoder_hidden_states": encoder_hidden_states,
        "timestep": _t(0.5),
        "position_ids": torch.cat([positions, images])[None],
        "segment_ids": torch.ones(1, tokens, dtype=torch.int64),
        "indicator": indicator,
    }


def _krea_2() -> Inputs:
    return {
        "hidden_states": _randn(1, H * W, 64),
        "encoder_hidden_states": _randn(1, TEXT, 3, WIDTH),
        "timestep": _t(0.5),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), _ids(H, W, 3)]),
        "encoder_attention_mask": _mask(),
    }


def _lumina_next() -> Inputs:
    angles = torch.randn(32, 32, 16)
    return {
        "hidden_states": _image(4),
        "timestep": _t(0.5),
        "encoder_hidden_states": _text(),
        "encoder_mask": _mask(),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _nucleus() -> Inputs:
    return {
        "hidden_states": _randn(1, H * W, 64),
        "img_shapes": [(1, H, W)],
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_mask": _mask(dtype=torch.int64),
        "timestep": _t(0.5),
    }


def _omnigen() -> Inputs:
    tokens = TEXT + 1 + H * W
    return {
        "hidden_states": _image(4),
        "timestep": _t(0.5),
        "input_ids": torch.randint(64, (1, TEXT)),
        "input_img_latents": [_randn(1, 4, 4, 8)],
        "input_image_sizes": {0: [[2, 10]]},
        "attention_mask": torch.ones(1, tokens, tokens, dtype=torch.int64),
        "position_ids": torch.arange(tokens)[None],
    }


def _prx() -> Inputs:
    return {"hidden_states": _image(), "timestep": _t(0.5), "encoder_hidden_states": _text()}


def _prior() -> Inputs:
    return {
        "hidden_states": _randn(1, WIDTH),
        "timestep": _step(),
        "proj_embedding": _randn(1, WIDTH),
        "encoder_hidden_states": _text(length=16),
        "attention_mask": _mask(16),
    }


def _qwen_image_21() -> Inputs:
    mask = torch.zeros(1, TEXT + H * W // 4, dtype=torch.bool)
    mask[:, TEXT:] = True
    return {
        "hidden_states": _randn(1, H * W, 64),
        "encoder_hidden_states": _text(),
        "timestep": _t(0.5),
        "img_shapes": [[(1, H, W)]],
        "img_mask": mask,
    }


# --- video ---


def _wan() -> Inputs:
    return {"hidden_states": _video(), "timestep": _step(), "encoder_hidden_states": _text()}


def _wan_vace() -> Inputs:
    return {**_wan(), "control_hidden_states": _video(32)}


def _wan_animate() -> Inputs:
    return {
        **_wan(),
        "hidden_states": _video(36, 3),
        "encoder_hidden_states_image": _text(length=12),
        "pose_hidden_states": _video(16, 2),
        "face_pixel_values": _randn(1, 3, 5, 16, 16),
    }


def _wan_animate_2() -> Inputs:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [_randn(16, FRAMES, 2 * H, 2 * W)],
        "timestep": _t(500),
        "encoder_hidden_states": [_randn(TEXT, WIDTH)],
        "condition_latents": [_randn(20, FRAMES, 2 * H, 2 * W)],
        "encoder_hidden_states_image": _randn(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": FRAMES * H * W,
        "offset_grid_sizes": torch.tensor([[FRAMES, H, W]]),
    }


def _anyflow(frames: int = FRAMES) -> Inputs:
    return {
        "hidden_states": _randn(1, frames, 16, 2 * H, 2 * W),
        "timestep": torch.full((1, frames), 500.0),
        "r_timestep": torch.full((1, frames), 250.0),
        "encoder_hidden_states": _text(),
    }


def _anyflow_far() -> Inputs:
    return {**_anyflow(4), "chunk_partition": [2, 2]}


def _helios() -> Inputs:
    return {
        **_wan(),
        "indices_hidden_states": torch.arange(FRAMES)[None] + 6.0,
        "indices_latents_history_short": torch.tensor([[5.0]]),
        "indices_latents_history_mid": torch.tensor([[4.0]]),
        "indices_latents_history_long": torch.arange(4.0)[None],
        "latents_history_short": _video(frames=1),
        "latents_history_mid": _video(frames=1),
        "latents_history_long": _video(frames=4),
    }


def _consisid() -> Inputs:
    return {
        "hidden_states": _randn(1, FRAMES, 16, 2 * H, 2 * W),
        "encoder_hidden_states": _text(),
        "timestep": _step(),
        "image_rotary_emb": _rope(FRAMES * H * W),
        "id_cond": _randn(1, WIDTH),
        "id_vit_hidden": [_text(length=4) for _ in range(2)],
    }


def _hunyuan_video_15() -> Inputs:
    return {
        "hidden_states": _randn(1, 64, FRAMES, H, W),
        "timestep": _t(500),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask(dtype=torch.int64),
        "encoder_hidden_states_2": _text(length=12),
        "encoder_attention_mask_2": _mask(12, torch.int64),
        "image_embeds": torch.zeros(1, 4, WIDTH, dtype=torch.bfloat16),
    }


def _framepack() -> Inputs:
    return {
        **_wan(),
        "encoder_attention_mask": _mask(dtype=torch.int64),
        "pooled_projections": _randn(1, WIDTH),
        "image_embeds": _text(length=8),
        "indices_latents": torch.arange(FRAMES) + 20,
        "guidance": _t(6000),
        "latents_clean": _video(frames=2),
        "indices_latents_clean": torch.tensor([0, 19]),
        "latents_history_2x": _video(frames=2),
        "indices_latents_history_2x": torch.tensor([17, 18]),
        "latents_history_4x": _video(frames=4),
        "indices_latents_history_4x": torch.tensor([1, 2, 3, 4]),
    }


def _joy_image() -> Inputs:
    return {"hidden_states": _video(frames=1), "timestep": _t(500), "encoder_hidden_states": _text()}


def _joy_image_plus() -> Inputs:
    return {
        "hidden_states": _randn(1, 2 * H * W, 16, 1, 2, 2),
        "timestep": _t(500),
        "encoder_hidden_states": _text(),
        "shape_list": [[(1, H, W), (1, H, W)]],
    }


def _kandinsky_5() -> Inputs:
    return {
        "hidden_states": _randn(1, FRAMES, 2 * H, 2 * W, 16),
        "encoder_hidden_states": _text(),
        "timestep": _t(500),
        "pooled_projections": _randn(1, WIDTH),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(H), torch.arange(W)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky_6() -> Inputs:
    return {
        "hidden_states": _randn(1, FRAMES, 2 * H, 2 * W, 16),
        "encoder_hidden_states": _text(),
        "pooled_projections": _randn(1, WIDTH),
        "timestep": _t(500),
        "audio_hidden_states": _randn(1, AUDIO, WIDTH),
    }


def _kandinsky_6_sr() -> Inputs:
    return {"hidden_states": _randn(1, FRAMES, 8, 16, 129), "timestep": _t(500)}


def _ltx_2() -> Inputs:
    return {
        "hidden_states": _randn(1, FRAMES * H * W, 64),
        "audio_hidden_states": _randn(1, AUDIO, 64),
        "encoder_hidden_states": _text(),
        "audio_encoder_hidden_states": _text(),
        "timestep": _t(500),
        "encoder_attention_mask": _mask(),
        "audio_encoder_attention_mask": _mask(),
        "num_frames": FRAMES,
        "height": H,
        "width": W,
        "audio_num_frames": AUDIO,
        "fps": 25.0,
    }


def _latte() -> Inputs:
    return {"hidden_states": _randn(1, 4, FRAMES, 16, 16), "timestep": _step(), "encoder_hidden_states": _text()}


def _minimax_h3() -> Inputs:
    video = FRAMES * H * W
    tags = torch.tensor([1] * TEXT + [2] * AUDIO + [0] * video)
    rows = torch.arange(len(tags))
    positions = torch.zeros(len(tags), 3)
    positions[:, 0] = rows
    return {
        "hidden_states": _randn(1, video, 64),
        "audio_hidden_states": _randn(1, AUDIO, 64),
        "encoder_hidden_states": _text(),
        "timestep": torch.tensor([0.5, 0.25]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": rows[tags == 0],
        "audio_indices": rows[tags == 2],
        "text_indices": rows[tags == 1],
    }


def _mochi() -> Inputs:
    return {
        "hidden_states": _video(),
        "encoder_hidden_states": _text(),
        "timestep": _step(),
        "encoder_attention_mask": _mask(),
    }


def _allegro() -> Inputs:
    return {
        "hidden_states": _video(4),
        "encoder_hidden_states": _text(),
        "timestep": _step(),
        "encoder_attention_mask": _mask(),
    }


def _motif() -> Inputs:
    return {"hidden_states": _video(33), "timestep": _step(), "encoder_hidden_states": _text()}


def _easy_animate() -> Inputs:
    return {"hidden_states": _video(), "timestep": _step(), "encoder_hidden_states": _text()}


def _sana_wm() -> Inputs:
    return {
        "hidden_states": _randn(1, 64, FRAMES, H, W),
        "timestep": torch.full((1, 1, FRAMES), 500),
        "encoder_hidden_states": _randn(1, 1, TEXT, WIDTH),
        "encoder_attention_mask": _mask(dtype=torch.int64),
    }


def _sana_wm_refiner() -> Inputs:
    cos, sin = _rope(FRAMES * H * W, WIDTH)
    return {
        "hidden_states": _randn(1, FRAMES * H * W, 64),
        "encoder_hidden_states": _text(),
        "timestep": _t(500),
        "video_rotary_emb": (cos[None], sin[None]),
    }


def _cosmos_3() -> Inputs:
    tokens = TEXT + H * W
    image = torch.arange(TEXT, tokens)
    return {
        "input_ids": torch.randint(64, (TEXT,)),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(tokens).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": tokens,
        "vision_tokens": [_randn(1, 64, 1, H, W)],
        "vision_token_shapes": [(1, H, W)],
        "vision_sequence_indexes": image,
        "vision_mse_loss_indexes": image,
        "vision_timesteps": torch.full((H * W,), 500.0),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


# --- sound, and others ---


def _ace_step() -> Inputs:
    return {
        "hidden_states": _randn(1, AUDIO, 64),
        "timestep": _t(0.5),
        "timestep_r": _t(0.25),
        "encoder_hidden_states": _text(),
        "context_latents": _randn(1, AUDIO, 128),
    }


def _longcat_audio() -> Inputs:
    return {
        "hidden_states": _randn(1, AUDIO, 64),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _mask(),
        "timestep": _t(0.5),
        "attention_mask": _mask(AUDIO),
    }


def _minimax_music() -> Inputs:
    return {"hidden_states": _randn(1, 64, AUDIO), "timestep": _t(0.5), "encoder_hidden_states": _text(length=AUDIO)}


def _depth_decoder() -> Inputs:
    return {"inputs_embeds": _randn(2, 8, WIDTH)}


def _stable_audio() -> Inputs:
    return {
        "hidden_states": _randn(1, 64, AUDIO),
        "timestep": _t(0.5),
        "encoder_hidden_states": _text(),
        "global_hidden_states": _randn(1, 1, WIDTH),
        "rotary_embedding": tuple(part.bfloat16() for part in _rope(AUDIO + 1, 16)),
    }


def _stable_audio_3() -> Inputs:
    return {
        "hidden_states": _randn(1, 64, AUDIO),
        "timestep": _t(0.5),
        "encoder_hidden_states": _text(),
        "global_hidden_states": _randn(1, WIDTH),
        "local_add_cond": _randn(1, WIDTH, AUDIO),
    }


def _t5_film() -> Inputs:
    return {
        "encodings_and_masks": [(_text(), _mask(dtype=torch.bfloat16))],
        "decoder_input_tokens": _text(length=16),
        "decoder_noise_time": _t(0.5),
    }


def _protein() -> Inputs:
    residues = 24
    return {
        "bb_ca": _randn(1, residues, 3),
        "local_latents": _randn(1, residues, 32),
        "bb_ca_time": _t(0.5),
        "local_latents_time": _t(0.5),
        "padding_mask": torch.ones(1, residues, dtype=torch.bool),
        "conditioning": {
            "is_in_context_conditioning": torch.zeros(1, residues, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, residues, dtype=torch.bool),
        },
    }


_FLUX: dict[str, Any] = {
    **_HEADS,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": _ROPE,
}
_WAN: dict[str, Any] = {**_HEADS, "num_layers": 2, "text_dim": WIDTH, "ffn_dim": 128, "rope_max_seq_len": 32}
_COGVIEW: dict[str, Any] = {
    **_HEADS,
    "num_layers": 2,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 64,
    "condition_dim": 32,
}
_HUNYUAN: dict[str, Any] = {**_HEADS, "num_layers": 2, "num_refiner_layers": 2, "text_embed_dim": WIDTH}
_LTX_2: dict[str, Any] = {
    **_HEADS,
    "num_layers": 2,
    "in_channels": 64,
    "out_channels": 64,
    "cross_attention_dim": 64,
    "audio_in_channels": 64,
    "audio_out_channels": 64,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64,
    "caption_channels": WIDTH,
}
_JOY: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": 2,
    "rope_dim_list": list(_ROPE),
}
_KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": WIDTH,
    "in_text_dim2": WIDTH,
    "time_dim": 64,
    "model_dim": 64,
    "ff_dim": 128,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": _ROPE,
}
_PIXEL: dict[str, Any] = {**_HEADS, "num_layers": 2, "attention_bias": True, "activation_fn": "gelu-approximate"}
_UNPATCHED: dict[str, Any] = {**_HEADS, "num_layers": 2, "in_channels": 64, "norm_num_groups": 8}

SAMPLES: dict[str, Sample] = {
    "AceStepTransformer1DModel": Sample(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "in_channels": 192,
            "audio_acoustic_hidden_dim": 64,
            "sliding_window": 8,
        },
        _ace_step,
    ),
    "AllegroTransformer3DModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "cross_attention_dim": 64,
            "caption_channels": WIDTH,
            "sample_height": 2 * H,
            "sample_width": 2 * W,
            "sample_frames": FRAMES,
        },
        _allegro,
    ),
    "AnyFlowFARTransformer3DModel": Sample({**_WAN}, _anyflow_far),
    "AnyFlowTransformer3DModel": Sample({**_WAN}, _anyflow),
    "BriaFibo2Transformer2DModel": Sample(
        {
            "in_channels": 16,
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "cap_feat_dim": WIDTH,
            "injection_layer_ids": (0,),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
            "axes_dims": _ROPE,
            "axes_lens": (64, 32, 32),
        },
        _bria_fibo_2,
    ),
    "BriaFiboTransformer2DModel": Sample({**_FLUX, "joint_attention_dim": 128, "text_encoder_dim": 64}, _bria_fibo),
    "BriaTransformer2DModel": Sample(_FLUX, _packed_image),
    "ChronoEditTransformer3DModel": Sample({**_WAN}, _wan),
    "CogView3PlusTransformer2DModel": Sample({**_COGVIEW, "pos_embed_max_size": 16, "sample_size": 16}, _cogview),
    "CogView4Transformer2DModel": Sample({**_COGVIEW, "sample_size": 16, "rope_axes_dim": (32, 32)}, _cogview),
    "ConsisIDTransformer3DModel": Sample(
        {
            **_HEADS,
            "num_attention_heads": 3,
            "num_layers": 2,
            "time_embed_dim": 64,
            "text_embed_dim": WIDTH,
            "sample_height": 2 * H,
            "sample_width": 2 * W,
            "max_text_seq_length": TEXT,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 32,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": WIDTH,
            "LFE_vit_dim": WIDTH,
            "LFE_depth": 4,
            "LFE_dim_head": 32,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 64,
            "LFE_ff_mult": 2,
            "LFE_num_scale": 2,
        },
        _consisid,
        blocks=("CogVideoXBlock", "ConsisIDBlock"),
        apart=("local_facial_extractor.proj_out",),  # a bare parameter, which only a graph shows to be a matrix
    ),
    "Cosmos3OmniTransformer": Sample(
        {
            "hidden_size": 64,
            "head_dim": 32,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "latent_channel": 64,
            "latent_patch_size": 1,
            "patch_latent_dim": 64,
            "rope_axes_dim": [8, 4, 4],
            "vocab_size": 64,
        },
        _cosmos_3,
    ),
    "DiTTransformer2DModel": Sample(
        {**_PIXEL, "in_channels": 4, "sample_size": 16, "num_embeds_ada_norm": 8},
        _dit,
        apart_in_blocks=("norm1.emb",),  # of the first block, which the model calls by itself once more
    ),
    "DreamLiteTransformer2DModel": Sample({**_UNPATCHED, "cross_attention_dim": WIDTH}, _unpatched),
    "EasyAnimateTransformer3DModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "mmdit_layers": 2,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "text_embed_dim": WIDTH,
            "time_embed_dim": 64,
        },
        _easy_animate,
    ),
    "ErnieImageTransformer2DModel": Sample(
        {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_in_dim": WIDTH,
            "rope_axes_dim": _ROPE,
        },
        _ernie_image,
    ),
    "Flux3Transformer2DModel": Sample(
        {**_FLUX, "in_channels": 64, "cond_in_channels": 64, "timestep_channels": 64, "axes_dims_rope": (8, 8, 8, 8)},
        _flux_3,
    ),
    "GlmImageTransformer2DModel": Sample({**_COGVIEW, "prior_vq_quantizer_codebook_size": 64}, _glm_image),
    "HeliosTransformer3DModel": Sample(
        {**{key: value for key, value in _WAN.items() if key != "rope_max_seq_len"}, "rope_dim": (12, 10, 10)}, _helios
    ),
    "HunyuanDiT2DModel": Sample(
        {
            **_HEADS,
            "num_layers": 4,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 16,
            "hidden_size": 64,
            "cross_attention_dim": WIDTH,
            "cross_attention_dim_t5": WIDTH,
            "pooled_projection_dim": 64,
            "text_len": 16,
            "text_len_t5": 16,
        },
        _hunyuan_dit,
    ),
    "HunyuanImageTransformer2DModel": Sample(
        {**_HUNYUAN, "num_single_layers": 2, "text_embed_2_dim": WIDTH, "rope_axes_dim": (16, 16)},
        _hunyuan_image,
        apart=("proj_out",),  # runs between two breaks of stock's, where no graph converts it
    ),
    "HunyuanVideo15Transformer3DModel": Sample(
        {
            **_HUNYUAN,
            "in_channels": 64,
            "text_embed_2_dim": WIDTH,
            "image_embed_dim": WIDTH,
            "rope_axes_dim": _ROPE,
            "target_size": 16,
            "task_type": "t2v",
        },
        _hunyuan_video_15,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Sample(
        {
            **_HUNYUAN,
            "num_single_layers": 2,
            "pooled_projection_dim": 64,
            "rope_axes_dim": _ROPE,
            "has_image_proj": True,
            "image_proj_dim": WIDTH,
            "has_clean_x_embedder": True,
        },
        _framepack,
        # The model cuts the text by its mask, so that graphs do not know its length and keep what reads it.
        apart=(
            "add_k_proj",
            "add_v_proj",
            "add_q_proj",
            "to_out.0",
            "to_add_out",
            "ff_context",
            "single_transformer_blocks",
            "proj_out",
        ),
    ),
    "Ideogram4Transformer2DModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "in_channels": 64,
            "intermediate_size": 128,
            "adaln_dim": 64,
            "llm_features_dim": WIDTH,
            "mrope_section": (8, 4, 4),
        },
        _ideogram,
    ),
    "JoyImageEditPlusTransformer3DModel": Sample(_JOY, _joy_image_plus),
    "JoyImageEditTransformer3DModel": Sample(_JOY, _joy_image),
    "Kandinsky5Transformer3DModel": Sample(_KANDINSKY, _kandinsky_5),
    "Kandinsky6SRTransformer3DModel": Sample(
        {
            "in_visual_dim": 64,
            "out_visual_dim": 64,
            "time_dim": 64,
            "model_dim": 64,
            "ff_dim": 128,
            "num_visual_blocks": 2,
            "axes_dims": _ROPE,
        },
        _kandinsky_6_sr,
    ),
    "Kandinsky6Transformer3DModel": Sample(
        {**_KANDINSKY, "visual_cond": False, "in_audio_dim": WIDTH, "out_audio_dim": WIDTH}, _kandinsky_6
    ),
    "Krea2Transformer2DModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "timestep_embed_dim": 64,
            "text_hidden_dim": WIDTH,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 128,
            "axes_dims_rope": _ROPE,
        },
        _krea_2,
    ),
    "LTX2VideoTransformer3DModel": Sample(_LTX_2, _ltx_2),
    "LatteTransformer3DModel": Sample(
        {
            **_PIXEL,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 16,
            "cross_attention_dim": 64,
            "caption_channels": WIDTH,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "num_embeds_ada_norm": 1000,
            "video_length": FRAMES,
        },
        _latte,
    ),
    "LongCatAudioDiTTransformer": Sample(
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": WIDTH, "latent_dim": 64}, _longcat_audio
    ),
    "LongCatImageTransformer2DModel": Sample({**_FLUX, "pooled_projection_dim": WIDTH}, _packed_image),
    "LuminaNextDiT2DModel": Sample(
        {
            "sample_size": 16,
            "hidden_size": 64,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 32,
            "learn_sigma": False,
            "cross_attention_dim": WIDTH,
        },
        _lumina_next,
    ),
    "MiniMaxH3Transformer3DModel": Sample(
        {
            **_HEADS,
            "hidden_size": 64,
            "num_layers": 2,
            "ffn_dim": 128,
            "in_channels": 16,
            "audio_in_channels": 64,
            "text_dim": WIDTH,
            "freq_dim": 64,
            "time_embed_hidden_dim": 64,
            "time_embed_dim": 64,
            "rope_freq_dim": 4,
        },
        _minimax_h3,
    ),
    "MiniMaxMusic3RVQDepthDecoder": Sample(
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "audio_vocab_size": 64,
        },
        _depth_decoder,
    ),
    "MiniMaxMusic3Transformer1DModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "in_channels": 64,
            "condition_dim": WIDTH,
            "ff_inner_dim": 128,
            "rotary_dim": 16,
            "fourier_embedding_dim": 64,
        },
        _minimax_music,
    ),
    "MochiTransformer3DModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "in_channels": 16,
            "pooled_projection_dim": 64,
            "text_embed_dim": WIDTH,
            "time_embed_dim": 64,
            "max_sequence_length": TEXT,
        },
        _mochi,
    ),
    "MotifVideoTransformer3DModel": Sample(
        {**_HEADS, "num_layers": 2, "num_single_layers": 2, "text_embed_dim": WIDTH, "rope_axes_dim": _ROPE}, _motif
    ),
    "NucleusMoEImageTransformer2DModel": Sample(
        {
            **_HEADS,
            "num_layers": 5,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": _ROPE,
            "num_experts": 4,
            "capacity_factors": 2.0,
            "moe_intermediate_dim": 64,
            "use_grouped_mm": True,
        },
        _nucleus,
    ),
    "OmniGenTransformer2DModel": Sample(
        {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 64,
            "time_step_dim": 64,
            "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        },
        _omnigen,
    ),
    "OvisImageTransformer2DModel": Sample(_FLUX, _packed_image),
    "PRXTransformer2DModel": Sample(
        {
            "context_in_dim": WIDTH,
            "hidden_size": 64,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [16, 16],
        },
        _prx,
    ),
    "PriorTransformer": Sample({**_HEADS, "num_layers": 2, "embedding_dim": WIDTH, "num_embeddings": 16}, _prior),
    "QwenImage21Transformer2DModel": Sample(
        {**_HEADS, "num_layers": 2, "context_in_dim": WIDTH, "axes_dims_rope": _ROPE}, _qwen_image_21
    ),
    "RFD4ProteinaTransformer": Sample(
        {
            "nlayers": 2,
            "token_dim": 64,
            "nheads": 2,
            "dim_cond": 64,
            "pair_repr_dim": 64,
            "t_emb_dim": 64,
            "tri_mult_c": 64,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        _protein,
    ),
    "SanaVideoTransformer3DModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 64,
            "caption_channels": WIDTH,
            "rope_max_seq_len": 32,
        },
        _wan,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Sample(_LTX_2, _sana_wm_refiner),
    "SanaWMTransformer3DModel": Sample(
        {
            "in_channels": 64,
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 32,
            "caption_channels": WIDTH,
        },
        _sana_wm,
    ),
    "SkyReelsV2Transformer3DModel": Sample(_WAN, _wan),
    "StableAudio3DiTModel": Sample(
        {
            "io_channels": 64,
            "embed_dim": 64,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": WIDTH,
            "global_cond_dim": WIDTH,
            "local_add_cond_dim": WIDTH,
            "timestep_features_dim": 64,
            "ff_mult": 2.0,
            "num_memory_tokens": 4,
        },
        _stable_audio_3,
    ),
    "StableAudioDiTModel": Sample(
        {
            **_HEADS,
            "num_layers": 2,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 64,
            "time_proj_dim": 64,
            "global_states_input_dim": WIDTH,
            "cross_attention_input_dim": WIDTH,
        },
        _stable_audio,
    ),
    "T5FilmDecoder": Sample(
        {
            "input_dims": WIDTH,
            "targets_length": 16,
            "d_model": 64,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 32,
            "d_ff": 128,
        },
        _t5_film,
    ),
    "Transformer2DModel": Sample(
        {**_UNPATCHED, "cross_attention_dim": WIDTH, "use_linear_projection": True}, _unpatched
    ),
    "TransformerTemporalModel": Sample(_UNPATCHED, _frames_of_images),
    "WanAnimate2Transformer3DModel": Sample(
        {
            "text_len": TEXT,
            "dim": 64,
            "ffn_dim": 128,
            "freq_dim": 64,
            "text_dim": WIDTH,
            "num_heads": 2,
            "num_layers": 2,
        },
        _wan_animate_2,
        # They run between two breaks of stock's, where no graph converts them.
        apart=("text_embedding", "time_embedding", "time_projection"),
    ),
    "WanAnimateTransformer3DModel": Sample(
        {
            **_WAN,
            "image_dim": WIDTH,
            "motion_encoder_channel_sizes": {"4": 64, "8": 64, "16": 64},
            "motion_encoder_size": 16,
            "motion_style_dim": 64,
            "motion_dim": 8,
            "motion_encoder_dim": 64,
            "face_encoder_hidden_dim": 64,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _wan_animate,
    ),
    "WanVACETransformer3DModel": Sample({**_WAN, "vace_layers": [0], "vace_in_channels": 32}, _wan_vace),
}
