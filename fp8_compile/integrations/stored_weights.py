"""How quantized weights stand in files: the layout that is written, and those of others that are read.

Whoever reads files, `load_fp8_checkpoint` or diffusers, asks the same two things of them: `Names` says what each tensor
is, and `join` makes weights of the constants, or says what is wrong with them.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, QuantizedWeightError, UnusedScaleWarning
from ..patterns import join as join_path
from ..schemes import DEFAULT_METHOD, Scheme, scheme_named
from ..schemes.fp8 import INPUT_SCALE
from ..weights.quantized_weight import WEIGHT_DTYPES, QuantizedWeight
from .formats import COMFY_FORMAT, tensors_of

Where = Callable[[str], Sequence[Any]]
"""Which files hold the tensor of a name, for errors."""

METADATA = "fp8_compile"
"""Under which key a safetensors file's metadata names the schemes of its weights."""

TIED = "fp8_compile_tied"
"""Under which key it names the weights that are one parameter of the model."""

# Under which names others store the scale of ``PATH.weight``: compressed-tensors and ModelOpt, ComfyUI, DeepSeek and
# transformers. The last call it the inverse, of what values were multiplied by; it is what multiplies FP8 here, too.
# https://github.com/vllm-project/compressed-tensors, https://github.com/NVIDIA/TensorRT-Model-Optimizer,
# https://github.com/comfyanonymous/ComfyUI/blob/master/comfy/ops.py,
# https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md,
# https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/finegrained_fp8.py
_SCALES = {"weight_scale": "_scale", "scale_weight": "_scale", "weight_scale_inv": "_scale"}

INPUT_SCALES = ("input_scale", "scale_input", "activation_scale")
"""The same of the static scale of the layer's activation."""

MARK = "scaled_fp8"
"""A tensor that such files hold besides."""

# ComfyUI says so, as JSON, in a tensor beside each weight, or of all of them in the file's metadata.
# https://github.com/comfyanonymous/ComfyUI/blob/master/QUANTIZATION.md
_COMFY_ENTRY, _COMFY_METADATA = "comfy_quant", "_quantization_metadata"

OWN = "fp8_compile"
"""The format of files that hold any scheme, and name it in their metadata."""


def split(state_dict: Mapping[str, Any], format: str = OWN) -> dict[str, Any]:
    """``state_dict`` with plain tensors only: each constant under the weight's name and the suffix of its scheme.

    A weight that is under several names gets constants of its own under each: any reader finds them.

    Raises:
        QuantizedWeightError: another ``format`` (`formats`) has no such weight. It names it.
    """
    plain: dict[str, Any] = {}
    repeated = {name for names in _tied(state_dict) for name in names[1:]}
    for name, value in state_dict.items():
        if isinstance(value, QuantizedWeight):
            for suffix, constant in _constants(name, value, format).items():
                plain[constant_name(name, suffix)] = constant.clone() if name in repeated else constant
        else:
            plain[name] = value
    return plain


def _constants(name: str, weight: QuantizedWeight, format: str) -> dict[str, Tensor]:
    """What a file has of ``weight``, by suffix."""
    if format == OWN:
        return weight.scheme.by_suffix(weight.constants)
    try:
        return tensors_of(weight, format)
    except QuantizedWeightError as error:
        raise QuantizedWeightError(f"{name!r} {error}") from error


def constant_name(weight: str, suffix: str) -> str:
    """Under which name a file has the constant of a weight, by what `Scheme.suffixes` says of it."""
    return f"{weight.rpartition('.')[0]}{suffix}".lstrip(".") if suffix.startswith(".") else f"{weight}{suffix}"


def _tied(state_dict: Mapping[str, Any]) -> list[list[str]]:
    """The names of each quantized weight that has several."""
    names: dict[int, list[str]] = {}
    for name, value in state_dict.items():
        if isinstance(value, QuantizedWeight):
            names.setdefault(id(value.identity), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def metadata_of(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """What a file's metadata says of ``state_dict``: methods, options and the weights of each, and which are tied."""
    schemes: dict[Scheme, list[str]] = {}
    for name, value in state_dict.items():
        if isinstance(value, QuantizedWeight):
            schemes.setdefault(value.scheme, []).append(name)
    if not schemes:
        return {}
    rows = [{"method": s.method, "options": s.common_options, "weights": names} for s, names in schemes.items()]
    tied = _tied(state_dict)
    return {METADATA: json.dumps(rows), **({TIED: json.dumps(tied)} if tied else {})}


def _metadata(files: Iterable[Any]) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """The metadata of each file that can be read; whoever reads its tensors says what is wrong with the others."""
    for file, opened in _opened(files):
        yield file, opened.metadata() or {}


def _opened(files: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Each file that can be read, and what safetensors makes of it."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        with contextlib.suppress(SafetensorError, OSError, TypeError), safe_open(file, framework="pt") as opened:
            yield file, opened


def schemes_in(files: Iterable[Any]) -> dict[str, Scheme]:
    """The scheme of each weight that the metadata of ``files`` names.

    Raises:
        CheckpointError: the metadata is not what `metadata_of` writes, or ComfyUI's names another format.
        UnknownMethodError: a method is not registered.
    """
    found: dict[str, Scheme] = {}
    for file, metadata in _metadata(files):
        key = METADATA
        try:
            rows = [(row["method"], row["options"], row["weights"]) for row in json.loads(metadata.get(key, "[]"))]
            key = _COMFY_METADATA
            layers = dict(json.loads(metadata.get(key, "{}")).get("layers", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"metadata {key!r} is damaged: {error!r}", [file]) from error
        for method, options, weights in rows:
            found |= dict.fromkeys(weights, scheme_named(method, options))
        for layer, entry in layers.items():
            if not _readable(entry):
                raise CheckpointError(f"metadata {key!r}, layer {layer!r}, says {_unreadable(entry)}", [file])
    return found


def fp8_in(files: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """The tensors in ``files`` that are 8-bit floating-point numbers, and their file, by the files' headers."""
    for file, opened in _opened(files):
        for name in opened.keys():  # noqa: SIM118
            if opened.get_slice(name).get_dtype().startswith("F8_"):
                yield file, name


def tied_in(files: Iterable[Any]) -> list[list[str]]:
    """The names of each weight that was one parameter when ``files`` were written.

    Raises:
        CheckpointError: the metadata is not what `metadata_of` writes.
    """
    found: list[list[str]] = []
    for file, metadata in _metadata(files):
        try:
            found += [[str(name) for name in names] for names in json.loads(metadata.get(TIED, "[]"))]
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"metadata {TIED!r} is damaged: {error!r}", [file]) from error
    return found


def _readable(entry: Any) -> bool:
    """Whether ComfyUI's ``entry`` for a layer names a format that its tensors here are read in."""
    return isinstance(entry, dict) and entry.get("format") == COMFY_FORMAT


def _unreadable(entry: Any) -> str:
    rotated = isinstance(entry, dict) and str(entry.get("format")).startswith("int8")
    remedy = "; of the weights that it was made from, method='int8' makes its like" if rotated else ""
    return f"{entry!r}: only {COMFY_FORMAT} can be read{remedy}"


class Names:
    """What the tensors of files are: values of quantized weights, other constants of these, marks, or plain tensors.

    Args:
        schemes: of the weights, by name, as the files' metadata has them.
        default: of the others.
        own: names that are the model's own, whatever they look like.
        given: names of all tensors, which say what weights have an input scale.
        input_scales: use those; else they are nothing, and activations are quantized by their own values.
    """

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        default: Scheme,
        own: Iterable[str] = (),
        given: Iterable[str] = (),
        input_scales: bool = True,
    ) -> None:
        if not input_scales:
            schemes = {w: s.with_input_scale(None) if INPUT_SCALE in s.suffixes() else s for w, s in schemes.items()}
        self.schemes, self.default, self.own = schemes, default, frozenset(own)
        self._constants = {
            constant_name(weight, suffix): (weight, suffix)
            for weight, scheme in schemes.items()
            for suffix in scheme.suffixes()[1:]
            if suffix is not None
        }
        self._leaves = {constant_name("weight", suffix): suffix for suffix in default.suffixes()[1:] if suffix}
        if default.method == DEFAULT_METHOD:
            self._leaves |= _SCALES
        self._static: dict[str, str] = {}  # the weight of each input scale
        scaled = {of[0] for name in given if (of := self.constant(name)) is not None}
        for name in given if input_scales else ():
            path, _, leaf = name.rpartition(".")
            if leaf in INPUT_SCALES and name not in self.own and (weight := join_path(path, "weight")) in scaled:
                self._static[name] = weight
        self._with_input_scale = frozenset(self._static.values())

    def constant(self, name: str) -> tuple[str, str] | None:
        """Of which weight the tensor ``name`` is another constant, and the suffix of that; or None."""
        if name in self._constants:
            return self._constants[name]
        for leaf, suffix in self._leaves.items():
            if name not in self.own and f".{name}".endswith(f".{leaf}"):
                return f"{name.removesuffix(leaf)}weight", suffix
        return (self._static[name], INPUT_SCALE) if name in self._static else None

    def needed(self, weight: str, scheme: Scheme) -> set[str]:
        """The suffixes of the constants that files have of ``weight``."""
        own = {suffix for suffix in scheme.suffixes() if suffix is not None}
        return own | {INPUT_SCALE} if weight in self._with_input_scale else own

    def is_mark(self, name: str) -> bool:
        """Whether nothing is made of the tensor ``name``."""
        leaf = name.rpartition(".")[2]
        unused = leaf in (MARK, _COMFY_ENTRY) or (leaf in INPUT_SCALES and self.constant(name) is None)
        return name not in self.own and unused

    def scheme(self, name: str, value: Tensor) -> Scheme | None:
        """The scheme of the weight whose values are ``value``, or None if their dtype is not that of quantized ones."""
        scheme = self.schemes.get(name, self.default)
        return scheme if value.dtype == next(iter(scheme.specs(1, 1).values())).dtype else None


def join(
    state_dict: Mapping[str, Any], where: Where, names: Names, dtype_of: Callable[[str], torch.dtype]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `split`, or another tool, took apart.

    Args:
        where: the files that hold the tensor of that name, for errors.
        dtype_of: what the weight of that name stands for.

    Returns:
        The state dict with `QuantizedWeight`s and without marks, and the tensors whose other parts are not in it.

    Warns:
        UnusedScaleWarning: a scale of activations is of no use with its weight.

    Raises:
        CheckpointError: values or scales are not what they should be, or do not fit together.
    """
    joined: dict[str, Any] = {}
    weights: dict[str, dict[str, str]] = {}  # the names of the constants of each, by suffix
    for name, value in state_dict.items():
        if isinstance(value, QuantizedWeight) or not isinstance(value, Tensor):
            joined[name] = value
        elif names.is_mark(name):
            if name.rpartition(".")[2] == _COMFY_ENTRY and not _readable(entry := _entry(value)):
                raise CheckpointError(f"tensor {name!r} says {_unreadable(entry)}", where(name), name)
        else:
            constant = names.constant(name)
            if constant is None and names.scheme(name, value) is None:
                joined[name] = value
                continue
            weight, suffix = constant or (name, "")
            others = weights.setdefault(weight, {})
            if suffix in others:
                problem = f"tensor {name!r} is a second scale of {weight!r}, beside {others[suffix]!r}"
                raise CheckpointError(problem, where(name), name)
            others[suffix] = name
    parts: dict[str, Tensor] = {}
    unused = []
    for weight, of_weight in weights.items():
        tensors = {suffix: state_dict[name] for suffix, name in of_weight.items()}
        if "" not in tensors and weight in state_dict:
            name, given = next(iter(of_weight.values())), str(state_dict[weight].dtype).removeprefix("torch.")
            problem = f"tensor {name!r} is a scale without FP8 values: {weight!r} holds {given}"
            raise CheckpointError(problem, where(name), name)
        scheme = names.scheme(weight, tensors[""]) if "" in tensors else None
        if scheme is not None and tensors.keys() >= names.needed(weight, scheme):
            joined[weight] = made = _weight(scheme, tensors, dtype_of(weight), where, of_weight)
            if INPUT_SCALE in tensors and INPUT_SCALE not in made.scheme.suffixes():
                unused.append(of_weight[INPUT_SCALE])
        else:
            parts |= {of_weight[suffix]: tensor for suffix, tensor in tensors.items()}
    if unused:
        warnings.warn(
            f"{', '.join(map(str, where(unused[0])))}: static scales of activations are not used where weights have a "
            f"scale for each block; activations are quantized by their own values there: {unused[0]} and "
            f"{len(unused) - 1} more",
            UnusedScaleWarning,
            stacklevel=4,
        )
    return joined, parts


def check_complete(parts: Mapping[str, Tensor], where: Where, names: Names) -> None:
    """Refuse ``parts``, which are all that `join` could make no weight of.

    Raises:
        CheckpointError: there is one.
    """
    for name in parts:
        kind = "FP8 values without a scale" if names.constant(name) is None else "a scale without FP8 values"
        raise CheckpointError(f"tensor {name!r} is {kind}", where(name), name)


def check_plain(state_dict: Mapping[str, Any], expected: Mapping[str, Tensor], where: Where) -> None:
    """Refuse tensors that are numbers without what they mean: integers, or another 8-bit format, for a weight.

    Raises:
        CheckpointError: there is one.
    """
    for name, value in state_dict.items():
        if isinstance(value, QuantizedWeight) or name not in expected or not expected[name].is_floating_point():
            continue
        if not value.is_floating_point() or value.itemsize == 1:
            given = str(value.dtype).removeprefix("torch.")
            problem = f"tensor {name!r} is {given} without a scale that is known; expected a floating-point tensor"
            raise CheckpointError(problem, where(name), name)


def _entry(value: Tensor) -> Any:
    try:
        return json.loads(bytes(value.flatten().tolist()))
    except (ValueError, TypeError):
        return f"no JSON, but {value.numel()} numbers"


def holding(tensor: str, files: Sequence[Any]) -> list[Any]:
    """Those of ``files`` that hold ``tensor``; all of them if none does, or they cannot be read."""
    found = [file for file, opened in _opened(files) if tensor in opened.keys()]  # noqa: SIM118
    return found or list(files)


def _weight(
    scheme: Scheme, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: Where, names: Mapping[str, str]
) -> QuantizedWeight:
    """The weight that ``tensors``, by the suffixes of ``scheme``, stand for.

    Args:
        names: of these tensors in the files, for errors.

    Raises:
        CheckpointError: they do not fit together.
    """
    try:
        found, constants = scheme.read(tensors)
        made = QuantizedWeight(found, constants, dtype if dtype in WEIGHT_DTYPES else torch.bfloat16)
        # bfloat16 and float32 reach as far as the scales do.
        if dtype == torch.float16 and not made.is_meta and not made.dequantize().isfinite().all():
            raise QuantizedWeightError("stands for values beyond the range of float16")
        return made
    except QuantizedWeightError as error:
        name = names[error.suffix]
        raise CheckpointError(f"tensor {name!r} {error}", where(name), name) from error
