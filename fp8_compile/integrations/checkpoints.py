"""FP8 weights in files: the layout that is written, and those of others that are read."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NothingConvertedWarning, QuantizedWeightError
from ..numerics import FP8_DTYPE
from ..options import Fp8Options
from ..quantize import choose, remember
from ..schemes import DEFAULT_METHOD, Scheme, scheme_named
from ..weights.quantized_weight import WEIGHT_DTYPES, QuantizedWeight

METADATA = "fp8_compile"
"""Under which key a safetensors file's metadata names the schemes of its weights."""


def split(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` with plain tensors only: each constant under the weight's name and the suffix of its scheme."""
    plain: dict[str, Any] = {}
    for name, value in state_dict.items():
        if isinstance(value, QuantizedWeight):
            for suffix, constant in zip(value.scheme.suffixes(), value.constants, strict=True):
                plain[f"{name}{suffix}"] = constant
        else:
            plain[name] = value
    return plain


def metadata_of(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """What a file's metadata says of the schemes in ``state_dict``: methods, options, and the weights of each."""
    schemes: dict[Scheme, list[str]] = {}
    for name, value in state_dict.items():
        if isinstance(value, QuantizedWeight):
            schemes.setdefault(value.scheme, []).append(name)
    if not schemes:
        return {}
    rows = [{"method": s.method, "options": s.options, "weights": names} for s, names in schemes.items()]
    return {METADATA: json.dumps(rows)}


def schemes_in(files: Iterable[Any]) -> dict[str, Scheme]:
    """The scheme of each weight that the metadata of ``files`` names.

    Raises:
        CheckpointError: the metadata is not what `metadata_of` writes.
        UnknownMethodError: a method is not registered.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Scheme] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get(METADATA, "[]")
        except (SafetensorError, OSError):
            continue  # whoever reads its tensors says what is wrong with it
        try:
            rows = [(row["method"], row["options"], row["weights"]) for row in json.loads(text)]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"metadata {METADATA!r} is damaged: {error!r}", [file]) from error
        for method, options, weights in rows:
            found |= dict.fromkeys(weights, scheme_named(method, options))
    return found


def _other_constants(schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """The weight, by the names of its constants in files; of those that bear a name of their own."""
    return {f"{weight}{suffix}": weight for weight, s in schemes.items() for suffix in s.suffixes()[1:]}


class Names:
    """Which tensors of files are constants, and of which weight.

    Args:
        schemes: of the weights, by name, as the files' metadata has them.
        default: for files that name none; there the dtype of the values tells a quantized weight.
    """

    def __init__(self, schemes: Mapping[str, Scheme], default: Scheme) -> None:
        self.schemes, self.default = schemes, default
        self._weights = _other_constants(schemes)
        self._suffixes = () if schemes else default.suffixes()[1:]
        self._dtype = None if schemes else next(iter(default.specs(1, 1).values())).dtype

    def weight_of(self, name: str) -> str | None:
        """The weight that the tensor ``name`` is another constant of, or None."""
        for suffix in self._suffixes:
            if name.endswith(f".weight{suffix}"):
                return name.removesuffix(suffix)
        return self._weights.get(name)

    def scheme_of(self, name: str, value: Any) -> Scheme | None:
        """The scheme of the weight whose values are ``value``, or None if it is no quantized weight."""
        if self._dtype is not None and isinstance(value, Tensor) and value.dtype == self._dtype:
            return self.default
        return self.schemes.get(name)


def join(
    state_dict: Mapping[str, Any], files: Sequence[Any], names: Names, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `split` took apart.

    Args:
        files: where the tensors come from, for errors.
        dtype: that the weights stand for.

    Returns:
        The state dict with `QuantizedWeight`s, and the tensors whose other parts are not in it.

    Raises:
        CheckpointError: a scale is not finite and positive, or has a shape that does not fit.
    """
    joined: dict[str, Any] = {}
    parts: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        weight, scheme = names.weight_of(name), names.scheme_of(name, value)
        if isinstance(value, QuantizedWeight) or not isinstance(value, Tensor):
            joined[name] = value
        elif weight is not None:
            if weight not in state_dict:
                parts[name] = value
            elif names.scheme_of(weight, state_dict[weight]) is None:
                joined[name] = value
        elif scheme is None:
            joined[name] = value
        else:
            of_weight = {suffix: f"{name}{suffix}" for suffix in scheme.suffixes()}
            there = {suffix: state_dict[part] for suffix, part in of_weight.items() if part in state_dict}
            if len(there) == len(of_weight):
                joined[name] = read_weight(scheme, there, dtype, files, of_weight)
            else:
                parts |= {of_weight[suffix]: tensor for suffix, tensor in there.items()}
    return joined, parts


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


def read_weight(
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    files: Sequence[Any],
    names: Mapping[str, str],
) -> QuantizedWeight:
    """The weight that ``tensors``, by the suffixes of ``scheme``, stand for.

    Args:
        names: of these tensors in the files, for errors.

    Raises:
        CheckpointError: they do not fit together.
    """
    try:
        found, constants = scheme.read(tensors)
        return QuantizedWeight(found, constants, dtype)
    except QuantizedWeightError as error:
        name = names[error.suffix]
        raise CheckpointError(f"tensor {name!r} {error}", holding(name, files), name) from error


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
    schemes = {name if rename is None else rename(name): s for name, s in schemes_in(files).items()}
    expected = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    found = _matched(tensors, expected, owner, schemes)
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
    if not any(isinstance(value, QuantizedWeight) for value in found.values()):
        warnings.warn(
            f"{', '.join(map(str, files))}: no weight is in FP8, so none of the model's will be, compiled or not; to "
            "convert it, read the files by load_state_dict and call quantize_",
            NothingConvertedWarning,
            stacklevel=3,  # past the decorator
        )
    remember(model, choices, Fp8Options())


def save_fp8_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to one safetensors file, which `load_fp8_checkpoint` reads: the constants of quantized weights.

    The file appears under its name when it is complete; one that was there is whole until then.
    """
    from safetensors.torch import save_file

    target = Path(path)
    state_dict = model.state_dict()
    plain = {name: t.contiguous() for name, t in split(state_dict).items()}
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    os.close(handle)
    try:
        save_file(_without_sharing(plain), scratch, metadata={"format": "pt", **metadata_of(state_dict)})
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
            raise CheckpointError("expected at least one file, got none", [])
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
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    owner: Mapping[str, Path],
    schemes: Mapping[str, Scheme],
) -> dict[str, Tensor]:
    """What each of ``expected`` is to become."""
    found: dict[str, Tensor] = {}
    constants = _other_constants(schemes)
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if name in constants:
            continue
        if leaf in _UNUSED or (leaf in _SCALES and name not in expected):
            weight = f"{layer}.weight"
            if leaf in _SCALES and (weight not in tensors or not _is_fp8(tensors[weight])):
                raise CheckpointError(f"tensor {name!r} is a scale without FP8 values", [owner[name]], name)
            continue
        if name not in expected:
            raise CheckpointError(f"tensor {name!r} is unknown to the model", [owner[name]], name)
        made = tensor
        if name in schemes:  # whose values may have another shape than the weight
            made = _quantized(name, tensors, expected[name].dtype, owner, schemes[name])
        if made.shape != expected[name].shape:
            problem = f"tensor {name!r} has shape {list(made.shape)}, and the model's has {list(expected[name].shape)}"
            raise CheckpointError(problem, [owner[name]], name)
        if _is_fp8(made):
            made = _quantized(name, tensors, expected[name].dtype, owner, None)
        found[name] = made
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"tensor {missing[0]!r} is missing", list(dict.fromkeys(owner.values())), missing[0])
    return found


def _quantized(
    name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, owner: Mapping[str, Path], scheme: Scheme | None
) -> QuantizedWeight:
    """The weight ``name``, of the scheme that the file names, or in one of the layouts of others."""
    if scheme is not None:
        names = {suffix: f"{name}{suffix}" for suffix in scheme.suffixes()}
    else:
        scheme = scheme_named(DEFAULT_METHOD, {})
        layer = name.rpartition(".")[0]
        scales = [f"{layer}.{leaf}" for leaf in _SCALES if f"{layer}.{leaf}" in tensors]
        if not scales:
            raise CheckpointError(f"tensor {name!r} is FP8 values without a scale", [owner[name]], name)
        names = {"": name, "_scale": scales[0]}
    for part in names.values():
        if part not in tensors:
            raise CheckpointError(f"tensor {part!r} is missing", [owner[name]], part)
    parts = {suffix: tensors[part] for suffix, part in names.items()}
    return read_weight(scheme, parts, dtype if dtype in WEIGHT_DTYPES else torch.bfloat16, [owner[name]], names)


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
            if not isinstance(value, QuantizedWeight):
                value = value.to(parameter.dtype)
            elif not isinstance(module, nn.Linear):
                value = value.dequantize()
            if isinstance(value, QuantizedWeight):
                module._parameters[name] = QuantizedWeight(value)
            else:
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and prefix + name in found:
                device = torch.device("cpu") if buffer.device.type == "meta" else buffer.device
                module._buffers[name] = found[prefix + name].to(device, buffer.dtype)
