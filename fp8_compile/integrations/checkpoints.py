"""Load and save whole models in FP8 files: safetensors of our own layout, and of others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import quantize
from ..errors import CheckpointError, NothingConvertedWarning
from ..options import Fp8Options, check_choice
from ..patterns import join as join_path
from ..quantize import choose, remember
from ..schemes import DEFAULT_METHOD, scheme_named
from ..weights.eligible import multiplied_otherwise
from ..weights.quantized_weight import QuantizedWeight
from .files import write_tensors
from .formats import FORMATS
from .stored_weights import (
    INPUT_SCALES,
    MARK,
    OWN,
    Names,
    check_complete,
    check_plain,
    join,
    metadata_of,
    schemes_in,
    split,
    tied_in,
)

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What ComfyUI's files put before the names of a model."""


@torch.no_grad()
def load_fp8_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    rename: Callable[[str], str | None] | None = None,
    input_scales: bool = True,
) -> None:
    """Fill ``model`` from safetensors files whose linears are in FP8, in place; the FP8 bytes are taken as they are.

    These layouts are read, with one scale for each output channel, one in all, or one for each block of 128 x 128 or
    1 x 128 values:

    - compressed-tensors and ModelOpt: ``PATH.weight``, ``PATH.weight_scale``, ``PATH.input_scale``;
    - DeepSeek and transformers: ``PATH.weight``, ``PATH.weight_scale_inv``, ``PATH.activation_scale``;
    - ComfyUI's scaled FP8: ``PATH.weight``, ``PATH.scale_weight`` or ``PATH.weight_scale``, ``PATH.scale_input``,
      ``PATH.comfy_quant``, ``scaled_fp8``; also with ``model.diffusion_model.`` before all names;
    - files that `save_fp8_checkpoint`, or diffusers' ``save_pretrained``, has written.

    Everything else is copied into the model's parameters and buffers, in their dtypes. Parameters that are tied in the
    model, or were in the one that a file was written from, are tied.

    Args:
        model: its parameters may be on the meta device; what they then get is on the CPU.
        path: a file, a directory of ``*.safetensors``, or several files.
        rename: from a name in the files to one in the model, where they differ; None drops the tensor.
        input_scales: layers whose activations have a scale in the files run with it (``activation_scheme="static"``);
            False: all activations are quantized by their own values, and these scales are not used.

    Warns:
        NothingConvertedWarning: the files hold no FP8 weight, so that none of the model's is in FP8.

    Raises:
        CheckpointError: there is no file or one cannot be read, a tensor is missing, unknown, of another shape, or FP8
            without a valid scale, or something of the model is on the meta device that no file can fill. It names file
            and tensor. The model is as it was.
    """
    files = _files(path)
    model = _unwrapped(model)
    expected = {
        layer_name(name): value
        for name, value in (*model.named_parameters(remove_duplicate=False), *_persistent_buffers(model).items())
    }
    owner: dict[str, Path] = {}
    tensors: dict[str, Tensor] = {}
    rename = _without_prefix(files, expected) if rename is None else rename
    for file in files:
        for given, tensor in _read(file):
            name = rename(given)
            if name is None:
                continue
            if name in tensors:
                hint = "; of the files of several variants, give those of one" if owner[name] != file else ""
                raise CheckpointError(f"tensor {name!r} is also in {owner[name]}{hint}", [file], given)
            tensors[name], owner[name] = tensor, file
    schemes = {new: s for name, s in schemes_in(files).items() if (new := rename(name)) is not None}
    names = Names(schemes, scheme_named(DEFAULT_METHOD, {}), expected, tensors, input_scales)
    found = _matched(tensors, expected, owner, names)
    for name in _left_on_meta(model, found):
        raise CheckpointError(
            f"tensor {name!r} of the model is on the meta device and in no checkpoint; put only parameters there, as "
            "accelerate.init_empty_weights does",
            files,
            name,
        )
    _fill(model, found)
    tie(model, [[new for name in names if (new := rename(name)) is not None] for names in tied_in(files)])
    choices = choose(model, Fp8Options(min_features=1))
    for choice in choices:
        # Experts that nothing multiplies in FP8 are in the files, and not so in the model.
        if not any(isinstance(found.get(name), QuantizedWeight) for name in choice.parameters):
            choice.reason = "not in FP8 in the checkpoint"
    if any(isinstance(value, QuantizedWeight) for value in found.values()):
        for hook in quantize.on_converted:
            hook(model, Fp8Options())
    else:
        warnings.warn(
            f"{', '.join(map(str, files))}: no weight is in FP8, so none of the model's will be, compiled or not; to "
            "convert it, read the files by load_state_dict and call quantize_",
            NothingConvertedWarning,
            stacklevel=3,  # past the decorator
        )
    remember(model, choices, Fp8Options())


def save_fp8_checkpoint(model: nn.Module, path: str | os.PathLike[str], format: str = OWN) -> None:
    """Write ``model`` to one safetensors file, which `load_fp8_checkpoint` reads: the constants of quantized weights.

    Args:
        format: "fp8_compile" holds every scheme. "compressed-tensors", "modelopt" and "comfyui" are for other tools,
            with FP8 weights and scales as those know them (`fp8_compile.integrations.formats`), and without metadata of
            ours: who reads them here gets default options. The tools' own configuration files are not written.

    Names are the model's own, without those of ``torch.compile``, ``DataParallel`` or ``PeftModel`` around it; adapters
    belong to the model that they are in. The file appears under its name when it is complete and on the disk; one that
    was there is whole until then.

    Warns:
        NothingConvertedWarning: no weight is in FP8.

    Raises:
        OptionError: ``format`` is not valid.
        QuantizedWeightError: ``format`` has no such weight as one of the model's. Nothing is written.
        CheckpointError: a tensor is on the meta device and has no values, ``path`` is no file, or cannot be written.
    """
    check_choice("format", format, (OWN, *FORMATS))
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        raise CheckpointError("is no regular file, and is not replaced by one", [target])
    state_dict = {layer_name(name): value for name, value in _unwrapped(model).state_dict().items()}
    for name, value in state_dict.items():
        if value.is_meta:
            raise CheckpointError(
                f"tensor {name!r} of the model is on the meta device: there is nothing to write", [target], name
            )
    metadata = metadata_of(state_dict)
    if not metadata:
        warnings.warn(
            f"{target}: no weight of the model is in FP8, so none of the file's is; compiling alone leaves the weights "
            "as they are, quantize_ converts them",
            NothingConvertedWarning,
            stacklevel=2,
        )
    plain = {name: t.contiguous() for name, t in split(state_dict, format).items()}
    write_tensors(_without_sharing(plain), target, {"format": "pt", **(metadata if format == OWN else {})})


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that put their own name before those of its tensors."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):  # a PeftModel, which adapters stay in
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def layer_name(name: str) -> str:
    """``name`` of a tensor without what ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _without_prefix(files: Sequence[Path], expected: Mapping[str, Tensor]) -> Callable[[str], str]:
    """For names that all have one of ComfyUI's prefixes, where the model's have none."""
    names = [name for file in files for name in _names(file)]
    for prefix in _PREFIXES:
        own = [name for name in names if name.rpartition(".")[2] not in (*INPUT_SCALES, MARK)]
        if own and all(n.startswith(prefix) for n in own) and not any(n.startswith(prefix) for n in expected):
            return lambda name: name.removeprefix(prefix)
    return lambda name: name


def tie(model: nn.Module, tied: Iterable[Sequence[str]]) -> None:
    """Make those parameters of ``model`` one again that were one, if their values are still the same.

    Args:
        tied: names of each, as `tied_in` has them.
    """
    parameters = {layer_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    owners = {layer_name(path): module for path, module in model.named_modules()}
    for names in tied:
        there = [name for name in names if isinstance(parameters.get(name), QuantizedWeight)]
        for name in there[1:]:
            if _alike(parameters[name], parameters[there[0]]):
                path, _, leaf = name.rpartition(".")
                owners[path]._parameters[leaf] = parameters[there[0]]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit by bit."""
    if isinstance(a, QuantizedWeight) and isinstance(b, QuantizedWeight):
        return a.scheme == b.scheme and all(map(_alike, a.constants, b.constants))
    if type(a) is not type(b) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


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


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"not a readable safetensors file: {error}", [file]) from error


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in names}


def _matched(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    owner: Mapping[str, Path],
    names: Names,
) -> dict[str, Tensor]:
    """What each of ``expected`` is to become."""

    def where(name: str) -> list[Path]:
        return [owner[name]]

    def check_shape(name: str, given: Tensor) -> None:
        if given.shape != expected[name].shape:
            problem = f"tensor {name!r} has shape {list(given.shape)}, and the model's has {list(expected[name].shape)}"
            raise CheckpointError(problem, where(name), name)

    for name, tensor in tensors.items():
        if names.constant(name) is not None or names.is_mark(name):
            continue
        if name not in expected:
            problem = f"tensor {name!r} is unknown to the model (rename may return None to drop it)"
            raise CheckpointError(problem, where(name), name)
        if name not in names.schemes:  # whose values may have another shape than the weight
            check_shape(name, tensor)
    found, parts = join(tensors, where, names, lambda name: expected[name].dtype)
    check_complete(parts, where, names)
    check_plain(found, expected, where)
    for name, made in found.items():
        check_shape(name, made)
    for name in expected:
        if name not in found:
            raise CheckpointError(f"tensor {name!r} is missing", list(dict.fromkeys(owner.values())), name)
    return found


def _left_on_meta(model: nn.Module, found: Mapping[str, Tensor]) -> Iterator[str]:
    """What `_fill` leaves there: buffers that are not saved, and tensors that are plain attributes."""
    for path, module in model.named_modules():
        for name, value in [*module._buffers.items(), *vars(module).items()]:
            full = layer_name(join_path(path, name))
            if isinstance(value, Tensor) and value.is_meta and full not in found:
                yield full


def _fill(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    made: dict[int, list[tuple[Tensor, nn.Parameter]]] = {}  # of what becomes of each parameter, by what is in files
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            given = found[layer_name(join_path(path, name))]
            others = made.setdefault(id(parameter), [])
            new = next((new for other, new in others if _alike(other, given)), None)
            if new is None:
                device = torch.device("cpu") if parameter.is_meta else parameter.device
                new = parameter_of(given.to(device), module, parameter.dtype)
                new.requires_grad_(parameter.requires_grad and type(new) is nn.Parameter)
                others.append((given, new))
            module._parameters[name] = new
        for name, buffer in list(module._buffers.items()):
            full = layer_name(join_path(path, name))
            if buffer is not None and full in found:
                device = torch.device("cpu") if buffer.is_meta else buffer.device
                module._buffers[name] = found[full].to(device, buffer.dtype)


def parameter_of(value: Tensor, module: nn.Module, dtype: torch.dtype) -> nn.Parameter:
    """The parameter of ``module`` that ``value`` becomes: a quantized weight only where one is multiplied as such."""
    if isinstance(value, QuantizedWeight):
        if isinstance(module, nn.Linear) or (value.dim() == 3 and multiplied_otherwise(module) is None):
            return QuantizedWeight(value)  # type: ignore[return-value]
        value = value.dequantize()
    return nn.Parameter(value.to(dtype), requires_grad=False)
