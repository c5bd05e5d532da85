"""Transformer blocks of diffusers at the size of the released models; `make` needs no memory and no weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Nothing may be fetched, and imports must stay quiet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

BF16, F32, C64 = torch.bfloat16, torch.float32, torch.complex64


@dataclass(frozen=True)
class Block:
    """One block and the arguments of one call.

    Attributes:
        build: makes the module.
        arguments: keyword arguments for a number of image tokens, on the meta device.
        text: text tokens that go with the image.
        float32: parts of parameters' paths that diffusers keeps in float32.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[[int], dict[str, Any]]
    text: int
    float32: tuple[str, ...] = ()


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _qwen_image() -> nn.Module:
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    return QwenImageTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)


def _qwen_image_arguments(tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, tokens, 3072),
        "encoder_hidden_states": _empty(1, 128, 3072),
        "encoder_hidden_states_mask": None,
        "temb": _empty(1, 3072),
        "image_rotary_emb": (_empty(tokens, 64, dtype=C64), _empty(128, 64, dtype=C64)),
    }


def _z_image() -> nn.Module:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

    return ZImageTransformerBlock(layer_id=0, dim=3840, n_heads=30, n_kv_heads=30, norm_eps=1e-5, qk_norm=True)


def _z_image_arguments(tokens: int) -> dict[str, Any]:
    rows = tokens + 128
    return {
        "x": _empty(1, rows, 3840),
        "attn_mask": None,
        "freqs_cis": _empty(1, rows, 64, dtype=C64),
        "adaln_input": _empty(1, 256),
    }


def _flux() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    return FluxTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)


def _flux_single() -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    return FluxSingleTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)


def _flux_arguments(tokens: int) -> dict[str, Any]:
    rows = tokens + 512
    return {
        "hidden_states": _empty(1, tokens, 3072),
        "encoder_hidden_states": _empty(1, 512, 3072),
        "temb": _empty(1, 3072),
        "image_rotary_emb": (_empty(rows, 128, dtype=F32), _empty(rows, 128, dtype=F32)),
    }


def _wan() -> nn.Module:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    return WanTransformerBlock(dim=5120, ffn_dim=13824, num_heads=40, cross_attn_norm=True)


def _wan_arguments(tokens: int) -> dict[str, Any]:
    rotary = (_empty(1, tokens, 1, 128, dtype=F32), _empty(1, tokens, 1, 128, dtype=F32))
    return {
        "hidden_states": _empty(1, tokens, 5120),
        "encoder_hidden_states": _empty(1, 512, 5120),
        "temb": _empty(1, 6, 5120, dtype=F32),
        "rotary_emb": rotary,
    }


def _nucleus_moe() -> nn.Module:
    from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformerBlock

    return NucleusMoEImageTransformerBlock(
        dim=2048, num_attention_heads=16, attention_head_dim=128, moe_enabled=True, use_grouped_mm=True
    )


def _nucleus_moe_arguments(tokens: int) -> dict[str, Any]:
    return {
        "hidden_states": _empty(1, tokens, 2048),
        "encoder_hidden_states": _empty(1, 128, 3584),
        "temb": _empty(1, 2048),
        "image_rotary_emb": (_empty(tokens, 64, dtype=C64), _empty(128, 64, dtype=C64)),
    }


BLOCKS = {
    "qwen-image": Block(_qwen_image, _qwen_image_arguments, text=128),
    "z-image": Block(_z_image, _z_image_arguments, text=128),
    "flux": Block(_flux, _flux_arguments, text=512),
    "flux-single": Block(_flux_single, _flux_arguments, text=512),
    "wan": Block(_wan, _wan_arguments, text=512, float32=("scale_shift_table", "norm2")),
    "nucleus-moe": Block(_nucleus_moe, _nucleus_moe_arguments, text=128),
}
"""Qwen-Image, Z-Image, both kinds of FLUX.1 and Wan 2.1 14B, at the sizes in their repositories' ``config.json``; and a
block with experts of NucleusMoE, at the sizes that are its class's defaults: 128 experts, of which 8 see each token."""


def make(name: str, tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """A block in BF16 and the arguments of a call with ``tokens`` image tokens.

    To be called within a ``FakeTensorMode``: parameters and arguments are fake tensors on the GPU.
    """

    def on_gpu(like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(like.shape, dtype=dtype, device="cuda")

    block = BLOCKS[name]
    with torch.device("meta"):
        module = block.build().eval()
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                kept = any(part in block.float32 for part in (*path.split("."), key))
                value = on_gpu(parameter, F32 if kept else BF16)
                owner._parameters[key] = nn.Parameter(value, requires_grad=False)
    return module, tree_map_only(Tensor, lambda value: on_gpu(value, value.dtype), block.arguments(tokens))


def make_on_cpu(name: str, tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """A block in float32 and the arguments of a call, with random numbers; rotations keep lengths."""

    def random(like: Tensor) -> Tensor:
        if like.is_complex():
            return torch.polar(torch.ones(like.shape), torch.randn(like.shape))
        return torch.randn(like.shape)

    block = BLOCKS[name]
    torch.manual_seed(0)
    module = block.build().eval().requires_grad_(False)
    return module, tree_map_only(Tensor, random, block.arguments(tokens))
