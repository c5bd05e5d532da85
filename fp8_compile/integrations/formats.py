"""FP8 weights under the names, and with the shapes of scales, that other tools read.

Only what differs from our own files is here: those have compressed-tensors' names already, and metadata of ours.

- compressed-tensors (``float-quantized``): ``PATH.weight_scale``, ``[N, 1]`` or ``[1]``, and ``PATH.input_scale``,
  ``[1]``. https://github.com/vllm-project/compressed-tensors
- ModelOpt: one scale for each weight and one for its activation, both without dimensions (``FP8``); or scales ``[N]``
  and dynamic activations (``FP8_PER_CHANNEL_PER_TOKEN``). https://github.com/NVIDIA/TensorRT-Model-Optimizer
- ComfyUI: one scale for each weight, ``PATH.weight_scale`` without dimensions, and a mark ``PATH.comfy_quant``; a
  static input scale may be there. https://github.com/comfyanonymous/ComfyUI/blob/master/QUANTIZATION.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import QuantizedWeightError
from ..schemes.fp8 import INPUT_SCALE
from ..weights.quantized_weight import QuantizedWeight

COMFY_FORMAT = "float8_e4m3fn"


def _compressed_tensors(scale: Tensor, given: Tensor | None) -> dict[str, Tensor]:
    return {"_scale": scale.reshape(-1, 1) if scale.dim() else scale.reshape(1), **_static(given, (1,))}


def _modelopt(scale: Tensor, given: Tensor | None) -> dict[str, Tensor]:
    if scale.dim() and given is not None:
        raise QuantizedWeightError("has a scale per row, which ModelOpt's files have with dynamic activations only")
    if not scale.dim() and given is None:
        raise QuantizedWeightError(
            "has one scale in all and dynamic activations, and ModelOpt's files have a static input scale then; "
            "calibrate (activation_scheme='static'), or quantize with granularity='row'"
        )
    return {"_scale": scale.reshape(-1) if scale.dim() else scale, **_static(given, ())}


def _comfyui(scale: Tensor, given: Tensor | None) -> dict[str, Tensor]:
    if scale.dim():
        raise QuantizedWeightError(
            "has a scale per row, and ComfyUI reads one in all; quantize with granularity='tensor'"
        )
    mark = torch.tensor(list(json.dumps({"format": COMFY_FORMAT}).encode()), dtype=torch.uint8)
    return {"_scale": scale, ".comfy_quant": mark, **_static(given, ())}


def _static(given: Tensor | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {} if given is None else {INPUT_SCALE: given.reshape(shape)}


FORMATS: Mapping[str, Callable[[Tensor, Tensor | None], dict[str, Tensor]]] = {
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "comfyui": _comfyui,
}


def tensors_of(weight: QuantizedWeight, format: str) -> dict[str, Tensor]:
    """What a file in ``format`` has of ``weight``, by suffixes as those of `Scheme.suffixes`.

    Raises:
        QuantizedWeightError: the format has no such weights.
    """
    named = weight.scheme.by_suffix(weight.constants)
    values, scale = named[""], named.get("_scale")
    ours = values.dtype == torch.float8_e4m3fn and set(named) <= {"", "_scale", INPUT_SCALE}
    if not ours or scale is None or scale.shape not in ((), (values.shape[0], 1)):
        raise QuantizedWeightError(
            f"is of {weight.scheme!r}; {format} has FP8 weights with one scale in all or one per row here"
        )
    return {"": values, **FORMATS[format](scale, named.get(INPUT_SCALE))}
