"""Give a trained Qwen-Image or Z-Image transformer outlier channels without changing what it computes.

Small models do not grow the outliers that make large ones hard to quantize (activations of Z-Image reach 6.6e4). This
moves scales between neighbouring layers instead, as SmoothQuant does in the other direction
(https://arxiv.org/abs/2211.10438): a channel is multiplied by ``factor`` where it is made, and the weights that read it
are divided by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fp8_compile.errors import Fp8Error

Pick = Callable[[str, int], Tensor]
"""Chooses channels of a place, given its path in the block and how many it has."""


class OutlierError(Fp8Error, ValueError):
    """A request for outliers that the model cannot have."""


@torch.no_grad()
def add_outliers(
    transformer: Any, factor: float, blocks: Iterable[int] | None = None, channels: int = 2, seed: int = 0
) -> dict[str, list[int]]:
    """Multiply ``channels`` random channels by ``factor`` in front of linears of the blocks of ``transformer``.

    In place. The function stays the same up to rounding; a power of two rounds least.

    * `QwenImageTransformer2DModel`, in both streams: the channels of both modulated norms (read by ``to_q``, ``to_k``,
      ``to_v``, ``add_*_proj`` and the first linear of each MLP: outliers in activations) and of the attention's values
      (made by ``to_v`` and ``add_v_proj``: outlier rows of their weights; read by ``to_out`` and ``to_add_out``). The
      modulation computes ``scale`` in ``x * (1 + scale) + shift``, so its bias takes ``factor - 1``.
    * `ZImageTransformer2DModel`, in its ``layers`` (the refiners stay): the channels of the norms in front of attention
      and MLP, by the norms' weights; of the attention's values, as above; and of the MLP's gated product, by the rows
      of ``w3``, which ``w2`` reads.

    Args:
        factor: more than 1. FP8 E4M3 spans a factor of about 2 ** 15 at full precision.
        blocks: indices of the blocks to change; None: all.

    Returns:
        Per changed place, by module path, the channels.

    Raises:
        OutlierError: another class of transformer, a factor of 1 or less or one that its weights overflow with, a
            block that is not there, or more channels than there are.
    """
    kind = type(transformer).__name__
    if kind not in _KINDS:
        raise OutlierError(f"{kind} has no known places for outliers; known: {', '.join(_KINDS)}")
    of_blocks, of_width, change = _KINDS[kind]
    all_blocks, width = getattr(transformer, of_blocks), int(getattr(transformer, of_width))
    chosen = list(range(len(all_blocks))) if blocks is None else list(blocks)
    if not factor > 1:
        raise OutlierError(f"factor={factor!r}: outliers need more than 1")
    dtype = transformer.dtype
    largest = max(p.abs().max().item() for p in all_blocks.parameters())
    if not max(largest, 1) * factor <= torch.finfo(dtype).max:
        raise OutlierError(f"factor={factor!r}: weights up to {largest:.3g} overflow {dtype}")
    if not all(0 <= index < len(all_blocks) for index in chosen):
        raise OutlierError(f"blocks={chosen!r}: the transformer has blocks 0 to {len(all_blocks) - 1}")
    if not 1 <= channels <= width:
        raise OutlierError(f"channels={channels!r}: from 1 to {width}, the width of the transformer")

    generator = torch.Generator().manual_seed(seed)
    places: dict[str, list[int]] = {}
    for index in chosen:

        def pick(place: str, among: int, index: int = index) -> Tensor:
            picked = torch.randperm(among, generator=generator)[:channels].sort().values
            places[f"{of_blocks}.{index}.{place}"] = picked.tolist()
            return picked

        change(all_blocks[index], width, factor, pick)
    return places


# Where the modulation of a block keeps shift and scale of its two norms: shift, scale, gate; shift, scale, gate.
_SHIFT_AND_SCALE = ((0, 1), (3, 4))


def _qwen_image(block: Any, width: int, factor: float, pick: Pick) -> None:
    attention = block.attn
    readers = {
        "img_mod": ([attention.to_q, attention.to_k, attention.to_v], [block.img_mlp.net[0].proj]),
        "txt_mod": ([attention.add_q_proj, attention.add_k_proj, attention.add_v_proj], [block.txt_mlp.net[0].proj]),
    }
    for name, of_norms in readers.items():
        modulation = getattr(block, name)[1]
        for number, ((shift, scale), linears) in enumerate(zip(_SHIFT_AND_SCALE, of_norms, strict=True), start=1):
            picked = pick(f"{name.removesuffix('_mod')}_norm{number}", width)
            for part in (shift, scale):
                _scale_rows(modulation, part * width + picked, factor)
            modulation.bias[scale * width + picked] += factor - 1
            _divide_columns(linears, picked, factor)
    picked = pick("attn.to_v", width)
    for value in (attention.to_v, attention.add_v_proj):
        _scale_rows(value, picked, factor)
    _divide_columns([attention.to_out[0], attention.to_add_out], picked, factor)


def _z_image(block: Any, width: int, factor: float, pick: Pick) -> None:
    attention, mlp = block.attention, block.feed_forward
    for name, linears in (
        ("attention_norm1", [attention.to_q, attention.to_k, attention.to_v]),
        ("ffn_norm1", [mlp.w1, mlp.w3]),
    ):
        picked = pick(name, width)
        getattr(block, name).weight[picked] *= factor
        _divide_columns(linears, picked, factor)
    for name, maker, reader in (
        ("attention.to_v", attention.to_v, attention.to_out[0]),
        ("feed_forward.w3", mlp.w3, mlp.w2),
    ):
        picked = pick(name, len(maker.weight))
        _scale_rows(maker, picked, factor)
        _divide_columns([reader], picked, factor)


_KINDS: dict[str, tuple[str, str, Callable[[Any, int, float, Pick], None]]] = {
    "QwenImageTransformer2DModel": ("transformer_blocks", "inner_dim", _qwen_image),
    "ZImageTransformer2DModel": ("layers", "dim", _z_image),
}
"""By class: the attributes that hold the blocks and the width, and what changes a block."""


def _scale_rows(linear: Any, rows: Tensor, factor: float) -> None:
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor


def _divide_columns(linears: Iterable[Any], columns: Tensor, factor: float) -> None:
    for linear in linears:
        linear.weight[:, columns] /= factor
