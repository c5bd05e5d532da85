"""Whole diffusers transformers at their released size with random weights, and tiny ones of the same classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Nothing may be fetched, and imports must stay quiet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Configuration of a transformer, and what it is run on.

    Attributes:
        config: what differs from the class's defaults, which are the released configurations.
        grid: height and width of the picture in tokens; a token is 16 x 16 pixels.
        text: text tokens.
    """

    config: Mapping[str, Any]
    grid: tuple[int, int]
    text: int


@dataclass(frozen=True)
class Model:
    """A transformer class.

    Attributes:
        title: what the model is called.
        blocks: the attributes that hold its repeated blocks, which are compiled one by one.
        inputs: keyword arguments of one call, from the model's config, the grid and the number of text tokens.
        shallow: beside ``released``, the configuration of a model of the same layers with the fewest blocks.
    """

    title: str
    class_name: str
    blocks: tuple[str, ...]
    inputs: Callable[[Any, tuple[int, int], int], Inputs]
    released: Size
    tiny: Size
    shallow: Mapping[str, int]

    def build(self, tiny: bool, device: str) -> tuple[nn.Module, Inputs]:
        """The model in BF16, as its layers initialise themselves, and the arguments of a call at 1024 x 1024 pixels."""
        import diffusers

        size = self.tiny if tiny else self.released
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = getattr(diffusers, self.class_name)(**size.config)
            model.to(torch.bfloat16).eval().requires_grad_(False)
            inputs = self.inputs(model.config, size.grid, size.text)
        return model, {**inputs, "return_dict": False}

    def repeated_blocks(self, model: Any) -> list[nn.Module]:
        """The blocks of ``model``, in their order."""
        return [block for name in self.blocks for block in getattr(model, name)]


def output(result: Any) -> Tensor:
    """The prediction in what a transformer returned with ``return_dict=False``."""
    first = result[0]
    return first if isinstance(first, Tensor) else torch.stack(list(first))


TORCHAO_SETTINGS: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
    "fx_graph_cache": True,
    "triton.unique_kernel_names": True,
}
"""What torchao 0.18 recommends to Inductor, and sets for the whole process unless told not to."""


def quantize_with_torchao(block: nn.Module, granularity: str) -> nn.Module:
    """Convert, in place and with torchao's dynamic FP8, the linears that ``fp8_diffusion`` runs as FP8 matmuls.

    The modulation, with its one row, is left alone: torchao has no weight-only scheme in the same call. Inductor's
    settings are left alone too: see `TORCHAO_SETTINGS`. torchao wants a GPU of compute capability 8.9 or higher, and
    fails on a CPU.

    Args:
        granularity: "row" or "tensor".

    Returns:
        ``block``.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_

    def chosen(module: nn.Module, path: str) -> bool:
        modulation = any(part in path for part in ("_mod", "adaLN", "norm"))
        return isinstance(module, nn.Linear) and not modulation and min(module.weight.shape) >= 256

    # Not its Inductor settings: it would set them for the whole process, so for every other case as well.
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow() if granularity == "row" else PerTensor(), set_inductor_config=False
    )
    quantize_(block, config, filter_fn=chosen)
    return block


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def _qwen_image(config: Any, grid: tuple[int, int], text: int) -> Inputs:
    return {
        "hidden_states": _normal(1, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": _normal(1, text, config.joint_attention_dim),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_shapes": [[(1, *grid)]],
    }


def _z_image(config: Any, grid: tuple[int, int], text: int) -> Inputs:
    return {
        "x": [_normal(config.in_channels, 1, 2 * grid[0], 2 * grid[1])],
        "t": torch.tensor([0.5], dtype=torch.bfloat16),
        "cap_feats": [_normal(text, config.cap_feat_dim)],
    }


def _flux(config: Any, grid: tuple[int, int], text: int) -> Inputs:
    rows, columns = (torch.arange(n) for n in grid)
    places = torch.stack(torch.meshgrid(torch.zeros(1, dtype=rows.dtype), rows, columns, indexing="ij"), dim=-1).view(
        -1, 3
    )
    return {
        "hidden_states": _normal(1, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": _normal(1, text, config.joint_attention_dim),
        "pooled_projections": _normal(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5]),
        "img_ids": places.to(torch.bfloat16),
        "txt_ids": torch.zeros(text, 3, dtype=torch.bfloat16),
    }


_WIDE = (64, 64)
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 128}
MODELS = {
    "qwen-image": Model(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        ("transformer_blocks",),
        _qwen_image,
        released=Size({}, _WIDE, text=128),
        tiny=Size({"num_layers": 2, "joint_attention_dim": 64, **_HEADS}, (6, 8), text=20),
        shallow={"num_layers": 1},
    ),
    "z-image": Model(
        "Z-Image",
        "ZImageTransformer2DModel",
        ("noise_refiner", "context_refiner", "layers"),
        _z_image,
        released=Size({}, _WIDE, text=128),
        tiny=Size(
            {"n_layers": 2, "n_refiner_layers": 1, "dim": 384, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64},
            (6, 8),
            text=20,
        ),
        shallow={"n_layers": 1, "n_refiner_layers": 1},
    ),
    "flux": Model(
        "FLUX.1-dev",
        "FluxTransformer2DModel",
        ("transformer_blocks", "single_transformer_blocks"),
        _flux,
        released=Size({"guidance_embeds": True}, _WIDE, text=512),
        tiny=Size(
            {
                "num_layers": 1,
                "num_single_layers": 1,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 32,
                "guidance_embeds": True,
                **_HEADS,
            },
            (6, 8),
            text=20,
        ),
        shallow={"num_layers": 1, "num_single_layers": 1},
    ),
}
"""Qwen-Image (20 B parameters), Z-Image (6 B) and FLUX.1-dev (12 B)."""
