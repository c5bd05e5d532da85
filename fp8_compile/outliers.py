"""Give a trained Qwen-Image transformer outlier channels without changing what it computes.

Small models do not grow the outliers that make large ones hard to quantize (activations of Z-Image reach 6.6e4). This
moves scales between neighbouring layers instead, as SmoothQuant does in the other direction
(https://arxiv.org/abs/2211.10438): a channel is multiplied by ``factor`` where it is made, and the weights that read it
are divided by as much.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import Fp8Error

# Where a block's modulation keeps shift and scale of its two norms: shift, scale, gate; shift, scale, gate.
_SHIFT_AND_SCALE = ((0, 1), (3, 4))


class OutlierError(Fp8Error, ValueError):
    """A request for outliers that the model cannot have."""


@torch.no_grad()
def add_outliers(
    transformer: Any, factor: float, blocks: Iterable[int] | None = None, channels: int = 2, seed: int = 0
) -> dict[str, list[int]]:
    """Multiply ``channels`` random channels by ``factor`` in front of linears of a `QwenImageTransformer2DModel`.

    In place. In each block these are, for both streams, the channels of both modulated norms (read by ``to_q``,
    ``to_k``, ``to_v``, ``add_*_proj`` and the first linear of each MLP: outliers in activations) and of the attention's
    values (made by ``to_v`` and ``add_v_proj``: outlier rows of their weights; read by ``to_out`` and ``to_add_out``).
    The function stays the same up to rounding. The modulation computes ``scale`` in ``x * (1 + scale) + shift``, so
    its bias takes ``factor - 1``; a power of two rounds least.

    Args:
        factor: more than 1. FP8 E4M3 spans a factor of about 2 ** 15 at full precision.
        blocks: indices of the blocks to change; None: all.

    Returns:
        Per changed place, by module path, the channels.

    Raises:
        OutlierError: a factor of 1 or less, a block that is not there, or more channels than there are.
    """
    count, width = len(transformer.transformer_blocks), int(transformer.inner_dim)
    chosen = list(range(count)) if blocks is None else list(blocks)
    if not factor > 1:
        raise OutlierError(f"factor={factor!r}: outliers need more than 1")
    if not all(0 <= index < count for index in chosen):
        raise OutlierError(f"blocks={chosen!r}: the transformer has blocks 0 to {count - 1}")
    if not 1 <= channels <= width:
        raise OutlierError(f"channels={channels!r}: from 1 to {width}, the width of the transformer")

    generator = torch.Generator().manual_seed(seed)
    places: dict[str, list[int]] = {}

    def pick(path: str) -> Tensor:
        picked = torch.randperm(width, generator=generator)[:channels].sort().values
        places[path] = picked.tolist()
        return picked

    for index in chosen:
        block, path = transformer.transformer_blocks[index], f"transformer_blocks.{index}"
        attention = block.attn
        readers = {
            "img_mod": ([attention.to_q, attention.to_k, attention.to_v], [block.img_mlp.net[0].proj]),
            "txt_mod": (
                [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj],
                [block.txt_mlp.net[0].proj],
            ),
        }
        for name, of_norms in readers.items():
            modulation = getattr(block, name)[1]
            for number, ((shift, scale), linears) in enumerate(zip(_SHIFT_AND_SCALE, of_norms, strict=True), start=1):
                picked = pick(f"{path}.{name.removesuffix('_mod')}_norm{number}")
                for part in (shift, scale):
                    _scale_rows(modulation, part * width + picked, factor)
                modulation.bias[scale * width + picked] += factor - 1
                for linear in linears:
                    linear.weight[:, picked] /= factor
        picked = pick(f"{path}.attn.to_v")
        for value in (attention.to_v, attention.add_v_proj):
            _scale_rows(value, picked, factor)
        for out in (attention.to_out[0], attention.to_add_out):
            out.weight[:, picked] /= factor
    return places


def _scale_rows(linear: Any, rows: Tensor, factor: float) -> None:
    linear.weight[rows] *= factor
    linear.bias[rows] *= factor
