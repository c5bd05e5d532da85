"""FP8 weights in files: the layout that is written, and those of others that are read."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NothingConvertedWarning
from ..numerics import FP8_DTYPE
from ..options import Fp8Options
from ..quantize import choose, keep_others, remember
from ..weights.quantized_weight import WEIGHT_DTYPES, Fp8Weight

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


# Under which names others store the scale of ``PATH.weight``: compressed-tensors and ModelOpt, ComfyUI.
# https://github.com/vllm-project/compressed-tensors, https://github.com/NVIDIA/TensorRT-Model-Optimizer,
# https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/ops.py
_SCALES = ("weight_scale", "scale_weight")

# What such files hold besides: scales of activations, which are computed from their values here, and a mark.
_UNUSED = ("input_scale", "scale_input", "scaled_fp8")


@torch.no_grad()
def load_fp8_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    rename: Callable[[str], str] | None = None,
) -> None:
    """Fill ``model`` from safetensors files whose linears are in FP8, in place; the FP8 bytes are taken as they are.

    These layouts are read, with one scale for each output channel or one in all:

    - compressed-tensors and ModelOpt: ``PATH.weight``, ``PATH.weight_scale``, ``PATH.input_scale``;
    - ComfyUI's scaled FP8: ``PATH.weight``, ``PATH.scale_weight``, ``PATH.scale_input``, ``scaled_fp8``;
    - files that `save_fp8_checkpoint`, or diffusers' ``save_pretrained``, has written.

    Scales of activations are not used: activations are quantized by their own values. Everything else is copied into
    the model's parameters and buffers, in their dtypes.

    Args:
        model: its parameters may be on the meta device; what they then get is on the CPU.
        path: a file, a directory of ``*.safetensors``, or several files.
        rename: from a name in the files to one in the model, where they differ.

    Warns:
        NothingConvertedWarning: the files hold no FP8 weight, so that none of the model's is in FP8.

    Raises:
        CheckpointError: there is no file or one cannot be read, a tensor is missing, unknown, of another shape, or FP8
            without a valid scale, or something of the model is on the meta device that no file can fill. It names file
            and tensor. The model is as it was.
    """
    files = _files(path)
    owner: dict[str, Path] = {}
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read(file):
            name = name if rename is None else rename(name)
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is also in {owner[name]}", [file], name)
            tensors[name], owner[name] = tensor, file
    expected = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    found = _matched(tensors, expected, owner)
    for name in _left_on_meta(model, found):
        raise CheckpointError(
            f"tensor {name!r} of the model is on the meta device and in no checkpoint; put only parameters there, as "
            "accelerate.init_empty_weights does",
            files,
            name,
        )
    _fill(model, found)
    choices = choose(model, Fp8Options(min_features=1))
    for choice in choices:
        choice.reason = "not in FP8 in the checkpoint"
    if not any(isinstance(value, Fp8Weight) for value in found.values()):
        warnings.warn(
            f"{', '.join(map(str, files))}: no weight is in FP8, so none of the model's will be, compiled or not; to "
            "convert it, read the files by load_state_dict and call quantize_",
            NothingConvertedWarning,
            stacklevel=3,  # past the decorator
        )
    keep_others(model, choices)
    remember(model, choices, Fp8Options())


def save_fp8_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to one safetensors file, which `load_fp8_checkpoint` reads: FP8 weights with their scales.

    The file appears under its name when it is complete; one that was there is whole until then.
    """
    from safetensors.torch import save_file

    target = Path(path)
    plain = {name: t.contiguous() for name, t in split(model.state_dict()).items()}
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    os.close(handle)
    try:
        save_file(_without_sharing(plain), scratch, metadata={"format": "pt"})
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def _without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights are written under each of their names."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return own


def _files(path: Any) -> list[Path]:
    if not isinstance(path, (str, os.PathLike)):
        files = [Path(one) for one in path]
        if not files:
            raise CheckpointError("no file is given; at least one belongs here", [])
        return files
    one = Path(path)
    files = sorted(one.glob("*.safetensors")) if one.is_dir() else [one]
    if not files:
        raise CheckpointError("no *.safetensors in this directory", [one])
    return files


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    name = None
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"not a readable safetensors file: {error}", [file], name) from error


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in names}


def _matched(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], owner: Mapping[str, Path]
) -> dict[str, Tensor]:
    """What each of ``expected`` is to become."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in _UNUSED or (leaf in _SCALES and name not in expected):
            weight = f"{layer}.weight"
            if leaf in _SCALES and (weight not in tensors or not _is_fp8(tensors[weight])):
                raise CheckpointError(f"tensor {name!r} is a scale without FP8 values", [owner[name]], name)
            continue
        if name not in expected:
            raise CheckpointError(f"tensor {name!r} is unknown to the model", [owner[name]], name)
        if tensor.shape != expected[name].shape:
            problem = (
                f"tensor {name!r} has shape {list(tensor.shape)}, and the model's has {list(expected[name].shape)}"
            )
            raise CheckpointError(problem, [owner[name]], name)
        found[name] = tensor if not _is_fp8(tensor) else _with_scale(name, tensor, tensors, expected, owner)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"tensor {missing[0]!r} is missing", list(dict.fromkeys(owner.values())), missing[0])
    return found


def _with_scale(
    name: str, qdata: Tensor, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], owner: Mapping[str, Path]
) -> Fp8Weight:
    layer = name.rpartition(".")[0]
    scales = [f"{layer}.{leaf}" for leaf in _SCALES if f"{layer}.{leaf}" in tensors]
    if not scales:
        raise CheckpointError(f"tensor {name!r} is FP8 values without a scale", [owner[name]], name)
    dtype = expected[name].dtype
    dtype = dtype if dtype in WEIGHT_DTYPES else torch.bfloat16
    return fp8_weight(qdata, tensors[scales[0]], dtype, [owner[name]], name, scales[0])


def _left_on_meta(model: nn.Module, found: Mapping[str, Tensor]) -> Iterator[str]:
    """What `_fill` leaves there: buffers that are not saved, and tensors that are plain attributes."""
    for path, module in model.named_modules():
        for name, value in [*module._buffers.items(), *vars(module).items()]:
            full = f"{path}.{name}" if path else name
            if isinstance(value, Tensor) and value.is_meta and full not in found:
                yield full


def _fill(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            value, device = found[prefix + name], parameter.device
            value = value.to("cpu" if device.type == "meta" else device)
            if not isinstance(value, Fp8Weight):
                value = value.to(parameter.dtype)
            elif not isinstance(module, nn.Linear):
                value = value.dequantize()
            made = Fp8Weight(value) if isinstance(value, Fp8Weight) else nn.Parameter(value, parameter.requires_grad)
            module._parameters[name] = made
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and prefix + name in found:
                device = torch.device("cpu") if buffer.device.type == "meta" else buffer.device
                module._buffers[name] = found[prefix + name].to(device, buffer.dtype)
