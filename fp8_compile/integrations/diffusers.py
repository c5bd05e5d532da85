"""FP8 weights through diffusers' own loading and saving: ``from_pretrained(quantization_config=...)``.

Imports diffusers. It is imported, and registered in diffusers' tables, as soon as both packages are (`registration`).

The layout in files is that of compressed-tensors: ``PATH.weight`` in float8_e4m3fn and ``PATH.weight_scale`` in
float32, ``[N, 1]`` or without dimensions; the options stand in ``config.json`` under ``quantization_config``.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from types import NoneType
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from .. import quantize
from ..checks import check_agreement, complain_of_nothing, parse_options, with_recipe
from ..errors import (
    CheckpointError,
    NonFiniteWeightError,
    NothingConvertedError,
    NothingConvertedWarning,
    OptionError,
)
from ..options import COMMON, RECOMMENDED, WEIGHT_OPTIONS, Fp8Options
from ..patterns import layer_path, parameter_layer
from ..quantize import Choice, check_at_load, check_choices, check_scales, choose, convert, quantized
from ..schemes import DEFAULT_METHOD, Scheme, scheme_for, scheme_named
from ..weights import eligible
from ..weights.layers import Layer
from ..weights.quantized_weight import QuantizedWeight
from .checkpoints import layer_name, parameter_of, tie
from .conversion import Rows
from .stored_weights import (
    Names,
    check_complete,
    check_plain,
    holding,
    join,
    metadata_of,
    schemes_in,
    split,
    tied_in,
)


class QuantMethod(StrEnum):
    """Under which name diffusers knows the quantizer."""

    FP8_DIFFUSION = "fp8_diffusion"


class Fp8DiffusionConfig(QuantizationConfigMixin):
    """What ``from_pretrained`` of a diffusers or transformers model takes as its ``quantization_config``.

    Args:
        options: those that concern weights: ``method``, ``ignored_layers``, ``layers``, ``min_features``, ``strict``,
            and the method's own, such as ``granularity``.

    Raises:
        OptionError: an option is unknown, invalid, concerns compilation alone, or cannot be served at load time.
    """

    def __init__(self, **options: Any) -> None:
        options.pop("quant_method", None)
        options = {**options.pop("method_options", {}), **options}
        compiling = [name for name in options if name in COMMON and name not in WEIGHT_OPTIONS]
        if compiling:
            raise OptionError(
                f"{', '.join(compiling)}: of no concern when weights are loaded; give it to torch.compile"
            )
        parsed = parse_options(options)
        if parsed.inductor:
            raise OptionError(f"{', '.join(parsed.inductor)}: a setting of Inductor; give it to torch.compile")
        check_at_load(parsed)
        self.quant_method: Any = QuantMethod.FP8_DIFFUSION
        for name, given in options.items():
            value = getattr(parsed, name, given)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def to_diff_dict(self) -> dict[str, Any]:
        """For ``repr``."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``config.json``; without scales, which weights hold."""
        plain = {name: value for name, value in vars(self).items() if name != "activation_scales"}
        return {**plain, "quant_method": self.quant_method.value}

    @property
    def options(self) -> Fp8Options:
        """The same as the options of the backend."""
        return parse_options({name: value for name, value in vars(self).items() if name != "quant_method"})


class Fp8DiffusionQuantizer(DiffusersQuantizer):
    """Turns each weight into FP8 as it arrives, or takes it out of a checkpoint that holds FP8.

    Which of the two is asked of each tensor, not of the configuration: FP8 files may come without one, and one may
    be given for files that are in FP8 in part. Only a configuration that was saved with the weights settles that
    those in BF16 stay so.
    """

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Fp8DiffusionConfig, **kwargs: Any) -> None:
        self._single_file = "pre_quantized" not in kwargs  # from_single_file, which has one state dict and no config
        self._saved_so = kwargs.get("pre_quantized", False)
        # Whatever is loaded may hold FP8, and then it is ours to say which shape a tensor should have.
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})
        self.options = quantization_config.options
        self._dtype = torch.bfloat16
        self._wanted: dict[str, Choice] = {}
        self._ignored: set[str] = set()
        self._float32: list[str] = []
        self._expected: dict[str, Tensor] = {}
        self._files: list[Any] = []
        self._fp8: set[str] = set()
        self._scheme: Scheme = scheme_for(self.options)
        if self._scheme.input_scale_missing:  # of FP8 in files, these say so
            self._scheme = self._scheme.with_input_scale(None)
        self._given: list[str] = []
        self._names = self._names_of({})
        self._parts: dict[str, Tensor] = {}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self._dtype = torch.bfloat16 if torch_dtype is None else torch_dtype
        return self._dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """All that stays as it is counts in full where ``device_map="auto"`` plans the memory."""
        in_fp8 = (self._fp8 - self._ignored) | self._wanted.keys()
        return {name: torch_dtype for name, _ in model.named_parameters() if name not in in_fp8}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Called before and after ``device_map`` is known in full.

        Raises:
            OptionError: FP8 of a file would go to the disk, where accelerate keeps plain arrays only.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values() and self._fp8:
            raise OptionError(
                "device_map puts parts of the model on the disk, which cannot hold the FP8 weights of these files: "
                "keep all of it in memory (device_map='cpu', and the pipeline's offloading functions)"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        self._files = list(checkpoint_files)
        self._given = loaded_keys
        self._names = self._names_of(schemes_in(self._files))
        constants = {key: self._names.constant(key) for key in loaded_keys}
        self._fp8 = {*self._names.schemes, *(of[0] for of in constants.values() if of is not None)}
        return [key for key, of in constants.items() if of is None and not self._names.is_mark(key)]

    def _names_of(self, schemes: Mapping[str, Scheme]) -> Names:
        """What the files' tensors are; a file's input scales are nothing where the user asked for other activations."""
        static = self.options.method_options.get("activation_scheme", "static") == "static" or self._saved_so
        return Names(schemes, self._default(schemes), self._expected, self._given, static)

    def _default(self, named: Mapping[str, Scheme]) -> Scheme:
        """The scheme of quantized weights that no file names: that of other tools' files, unless all is our own."""
        ours = self._scheme.method == DEFAULT_METHOD or (self._saved_so and not named)
        return self._scheme if ours else scheme_named(DEFAULT_METHOD, {})

    def _where(self, name: str) -> list[Any]:
        return holding(name, self._files)

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if RECOMMENDED in self.options.ignored_layers:  # a file says which layers these are: a recipe may change
            self.options = with_recipe(self.options, model, stacklevel=3)
            self.quantization_config = config_of(self.options)
        self._float32 = list(keep_in_fp32_modules or [])
        self._expected = dict(model.state_dict())
        self._names = self._names_of(self._names.schemes)
        if state_dict is not None:  # a single file's, whose names are the model's by now
            state_dict.update({name: value.weight() for name, value in state_dict.items() if isinstance(value, Rows)})
            for parameter in filter(Tensor.is_floating_point, model.parameters()):
                parameter.data = torch.empty_like(parameter, dtype=self._dtype)  # made in float32, which few become
            check_plain(state_dict, self._expected, self._where)
            self._fp8 = {name for name, value in state_dict.items() if isinstance(value, QuantizedWeight)}
        if self._saved_so:
            return
        choices = self._choices(model)
        for choice in choices:
            if choice.pattern is None and not self._fp8.isdisjoint(choice.parameters):
                choice.reason = None  # it is in FP8, however narrow
        unquantized = (choice for choice in choices if self._fp8.isdisjoint(choice.parameters))
        check_scales(model, unquantized, self.options)
        check_choices(model, choices, self.options)
        self._wanted = {name: c for c in choices if c.reason is None for name in c.parameters}
        self._ignored = {name for c in choices if c.pattern is not None for name in c.parameters}

    def _choices(self, model: nn.Module) -> list[Choice]:
        choices = choose(model, self.options)
        for choice in choices:
            if choice.reason is None and any(s in self._float32 for path in choice.paths for s in path.split(".")):
                choice.reason = "weight is float32, not bfloat16 or float16"
        return choices

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Make `QuantizedWeight`s of the constants in a shard. Those whose others are elsewhere wait."""
        if self._single_file:
            self._given = list(state_dict)
            self._names = self._names_of({})
        together = {**self._parts, **state_dict}
        state_dict, self._parts = join(together, self._where, self._names, lambda name: self._dtype)
        if self._single_file:  # whose names are converted before it is loaded
            check_complete(self._parts, self._where, self._names)
            state_dict = {n: Rows.of(v) if isinstance(v, QuantizedWeight) else v for n, v in state_dict.items()}
        check_plain(state_dict, self._expected, self._where)
        return state_dict

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        return isinstance(param_value, QuantizedWeight) or param_name in self._wanted

    def check_quantized_param_shape(self, param_name: str, expected: Any, param: Any) -> None:
        raise CheckpointError(
            f"tensor {param_name!r} has shape {list(param.shape)}, and the model's has {list(expected.shape)}",
            self._where(param_name),
            param_name,
        )

    def create_quantized_param(  # type: ignore[override]
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        path, leaf = param_name.rpartition(".")[::2]
        module = model.get_submodule(path)
        if isinstance(param_value, QuantizedWeight):
            if param_name in self._ignored:  # asked to be no FP8: the numbers that it stands for
                param_value = param_value.dequantize()
            elif not self._saved_so:
                entry = eligible.entry_of(Layer((layer_path(parameter_layer(path, leaf)),)), self.options)
                check_agreement(self.options, param_value.scheme, entry)
            made = parameter_of(param_value.to(target_device), module, param_value.dtype)
        else:
            scheme = self._wanted[param_name].scheme
            made = quantized(param_value, scheme, torch.device(target_device))  # type: ignore[assignment]
        if made is None:
            raise NonFiniteWeightError([path])
        module._parameters[leaf] = made

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        check_complete(self._parts, self._where, self._names)
        tie(model, tied_in(self._files))
        choices = self._choices(model)
        for choice in choices:
            if choice.reason is None and choice.parameters[0] not in self._wanted:
                choice.reason = "not in FP8 in the checkpoint"
        for choice in choices:
            if choice.reason is None and choice.weight.is_meta and not hasattr(choice.owners[0][0], "_hf_hook"):
                name = choice.parameters[0]
                raise CheckpointError(f"tensor {name!r} is missing", self._files, name)
        finish(model, choices, self.options)
        if self._saved_so and not any(isinstance(parameter, QuantizedWeight) for parameter in model.parameters()):
            reasons = Counter(str(choice.reason) for choice in choices for _ in choice.paths)
            complain_of_nothing(reasons, "linears of this model", strict=self.options.strict, stacklevel=4)
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator] # single files
        _mark(model)
        self._wanted, self._expected = {}, {}
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        named = {layer_name(name): value for name, value in state_dict.items()}
        return split(named), metadata_of(named)

    def _dequantize(self, model: Any) -> Any:
        quantize.dequantize(model)
        # diffusers drops the quantizer, but would save the configuration, which then would be an untrue one.
        rest = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = FrozenDict(rest)  # type: ignore[no-untyped-call]
        _mark(model)
        return model


def config_of(options: Fp8Options) -> Fp8DiffusionConfig:
    """What a configuration holds of ``options``."""
    return Fp8DiffusionConfig(**options.of_weights())


def finish(model: nn.Module, choices: list[Choice], options: Fp8Options) -> None:
    """Carry out what loading has left of ``choices``, and say what it could not do.

    With a part of the model on the disk, diffusers and transformers load past their quantizers what goes there, and
    diffusers what goes to the CPU.

    Warns:
        NothingConvertedWarning: weights that were to become FP8 are kept elsewhere by accelerate's hooks.

    Raises:
        NonFiniteWeightError: see `quantize_`.
        NothingConvertedError: instead of the warning, under ``strict``.
    """
    left = [choice for choice in choices if choice.reason is None and choice.weight.is_meta]
    for choice in left:
        choice.reason = "weight is offloaded by device_map"
    convert(model, choices, options)
    paths = [path for choice in left for path in choice.paths]
    if paths:
        message = (
            f"{len(paths)} linears were not quantized, because device_map offloads them: {', '.join(paths[:3])}"
            f"{' and others' if len(paths) > 3 else ''}; load the whole model into memory"
        )
        if options.strict:
            raise NothingConvertedError(message)
        warnings.warn(message, NothingConvertedWarning, stacklevel=4)


def attach(model: nn.Module, options: Fp8Options) -> None:
    """Let a diffusers model that was converted in memory, also inside a wrapper, be saved as one that was loaded so."""
    modeling = sys.modules.get("diffusers.models.modeling_utils")
    for module in model.modules() if modeling is not None else ():
        if not isinstance(module, modeling.ModelMixin):  # type: ignore[union-attr]
            continue
        if not any(isinstance(parameter, QuantizedWeight) for parameter in module.parameters()):
            continue  # such as the VAE of what was converted as a whole
        if isinstance(getattr(module, "hf_quantizer", None), (Fp8DiffusionQuantizer, NoneType)):
            module.hf_quantizer = Fp8DiffusionQuantizer(config_of(options), pre_quantized=False)
            module.quantization_method = QuantMethod.FP8_DIFFUSION
            module.register_to_config(quantization_config=module.hf_quantizer.quantization_config)
        _mark(module)


def _mark(model: Any) -> None:
    """Tell diffusers what the model's linears are, or are no more.

    - It is not `is_quantized`: to such models diffusers refuses ``to(dtype=...)``, also that of `save_lora_adapter`. A
      `QuantizedWeight` can do it.
    - Layerwise casting leaves converted linears out: FP8 without scales is not what they hold.
    """
    model.is_quantized = False
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module._parameters.get("weight"), QuantizedWeight)
    ]
    model._skip_layerwise_casting_patterns = (
        *(type(model)._skip_layerwise_casting_patterns or ()),
        *(f"^{re.escape(path)}$" for path in paths),
    )


AUTO_QUANTIZER_MAPPING[QuantMethod.FP8_DIFFUSION.value] = Fp8DiffusionQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.FP8_DIFFUSION.value] = Fp8DiffusionConfig
quantize.on_converted.append(attach)
