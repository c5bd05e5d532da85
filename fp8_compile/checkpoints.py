"""FP8 weights in files: the layout that is written, and those of others that are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .fp8_weight import Fp8Weight
from .numerics import FP8_DTYPE

SCALE_SUFFIX = ".weight_scale"


def split(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` with plain tensors only: FP8 values under the weight's name, the scale under ``weight_scale``."""
    plain: dict[str, Any] = {}
    for name, value in state_dict.items():
        if isinstance(value, Fp8Weight):
            plain[name] = value.qdata
            plain[f"{name}_scale"] = value.scale
        else:
            plain[name] = value
    return plain


def join(
    state_dict: Mapping[str, Any], files: Sequence[Any], dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `split` took apart.

    Args:
        files: where the tensors come from, for errors.
        dtype: that the weights stand for.

    Returns:
        The state dict with `Fp8Weight`s, and the tensors whose other half is not in it.

    Raises:
        CheckpointError: a scale is not finite and positive, or has a shape that does not fit.
    """
    joined: dict[str, Any] = {}
    halves: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if name.endswith(SCALE_SUFFIX) and f"{name.removesuffix('_scale')}" not in state_dict:
            halves[name] = value
        elif isinstance(value, Fp8Weight) or not isinstance(value, Tensor) or value.dtype != FP8_DTYPE:
            if not (name.endswith(SCALE_SUFFIX) and _is_fp8(state_dict[name.removesuffix("_scale")])):
                joined[name] = value
        elif f"{name}_scale" in state_dict:
            joined[name] = fp8_weight(value, state_dict[f"{name}_scale"], dtype, files, name)
        else:
            halves[name] = value
    return joined, halves


def holding(tensor: str, files: Sequence[Any]) -> list[Any]:
    """Those of ``files`` that hold ``tensor``; all of them if none does, or they cannot be read."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                if tensor in opened.keys():  # noqa: SIM118
                    found.append(file)
        except (SafetensorError, OSError, TypeError):
            continue
    return found or list(files)


def _is_fp8(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == FP8_DTYPE


def fp8_weight(
    qdata: Tensor, scale: Tensor, dtype: torch.dtype, files: Sequence[Any], name: str, scale_name: str | None = None
) -> Fp8Weight:
    """The weight that FP8 values ``[N, K]`` and a scale stand for: one for each row, or one in all.

    Raises:
        CheckpointError: they do not fit together.
    """
    scale_name = scale_name or f"{name}_scale"
    if qdata.dim() != 2:
        problem = f"tensor {name!r}: FP8 values of shape {list(qdata.shape)} are no matrix"
        raise CheckpointError(problem, holding(name, files), name)
    rows = qdata.shape[0]
    if scale.numel() == 1 and rows != 1:
        fitting = scale.reshape(())
    elif scale.numel() == rows and scale.dim() <= 2 and scale.shape[:1] in ((rows,), ()):
        fitting = scale.reshape(rows, 1)
    else:
        raise CheckpointError(
            f"tensor {scale_name!r} has shape {list(scale.shape)}; a scale for the {list(qdata.shape)} values of "
            f"{name!r} has one element, or [{rows}, 1] (block-wise scales cannot be read yet)",
            holding(scale_name, files),
            scale_name,
        )
    fitting = fitting.float()
    if fitting.device.type != "meta" and not (fitting.isfinite() & (fitting > 0)).all():
        problem = f"tensor {scale_name!r} holds a scale that is NaN, infinite, zero or negative"
        raise CheckpointError(problem, holding(scale_name, files), scale_name)
    return Fp8Weight(qdata.contiguous(), fitting.contiguous(), dtype)
