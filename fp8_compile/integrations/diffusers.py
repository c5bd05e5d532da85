"""FP8 weights through diffusers' own loading and saving: ``from_pretrained(quantization_config=...)``.

Imports diffusers. It is imported, and registered in diffusers' tables, as soon as both packages are (`registration`).

The layout in files is that of compressed-tensors: ``PATH.weight`` in float8_e4m3fn and ``PATH.weight_scale`` in
float32, ``[N, 1]`` or without dimensions; the options stand in ``config.json`` under ``quantization_config``.
"""

from __future__ import annotations

import sys
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
from ..checks import parse_options
from ..errors import CheckpointError, NonFiniteWeightError, OptionError
from ..options import COMMON, WEIGHT_OPTIONS, Fp8Options
from ..quantize import Choice, check_choices, choose, quantized, remember, scheme_at_load
from ..schemes import Scheme
from ..weights.quantized_weight import QuantizedWeight
from .checkpoints import Names, holding, join, metadata_of, schemes_in, split


class QuantMethod(StrEnum):
    """Under which name diffusers knows the quantizer."""

    FP8_DIFFUSION = "fp8_diffusion"


class Fp8DiffusionConfig(QuantizationConfigMixin):
    """What ``from_pretrained`` of a diffusers or transformers model takes as its ``quantization_config``.

    Args:
        options: those that concern weights: ``method``, ``ignored_layers``, ``min_features``, ``strict``, and the
            method's own, such as ``granularity``.

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
        scheme_at_load(parsed)
        self.quant_method: Any = QuantMethod.FP8_DIFFUSION
        for name, given in options.items():
            value = getattr(parsed, name, given)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def to_diff_dict(self) -> dict[str, Any]:
        """For ``repr``."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``config.json``."""
        return {**vars(self), "quant_method": self.quant_method.value}

    @property
    def options(self) -> Fp8Options:
        """The same as the options of the backend."""
        return parse_options({name: value for name, value in vars(self).items() if name != "quant_method"})


class Fp8DiffusionQuantizer(DiffusersQuantizer):
    """Turns each weight into FP8 as it arrives, or takes it out of a checkpoint that holds FP8."""

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Fp8DiffusionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.options = quantization_config.options
        self._dtype = torch.bfloat16
        self._wanted: dict[str, Choice] = {}
        self._float32: list[str] = []
        self._files: list[Any] = []
        self._scheme: Scheme = scheme_at_load(self.options)
        self._names = Names({}, self._scheme)
        self._parts: dict[str, Tensor] = {}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self._dtype = torch.bfloat16 if torch_dtype is None else torch_dtype
        return self._dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        self._files = list(checkpoint_files)
        if not self.pre_quantized:
            return loaded_keys
        self._names = Names(schemes_in(self._files), self._scheme)
        return [key for key in loaded_keys if self._names.weight_of(key) is None]

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: list[str] | None = None, **_: Any
    ) -> None:
        self._float32 = list(keep_in_fp32_modules or [])
        if self.pre_quantized:
            return
        choices = self._choices(model)
        check_choices(choices, self.options)
        self._wanted = {f"{path}.weight": c for c in choices if c.reason is None for path in c.paths}

    def _choices(self, model: nn.Module) -> list[Choice]:
        choices = choose(model, self.options)
        for choice in choices:
            if choice.reason is None and any(s in self._float32 for path in choice.paths for s in path.split(".")):
                choice.reason = "weight is float32, not bfloat16 or float16"
        return choices

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Make `QuantizedWeight`s of the constants in a shard. Those whose others are elsewhere wait."""
        if not self.pre_quantized:
            return state_dict
        state_dict, self._parts = join({**self._parts, **state_dict}, self._files, self._names, self._dtype)
        return state_dict

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        return isinstance(param_value, QuantizedWeight) or param_name in self._wanted

    def check_quantized_param_shape(self, param_name: str, expected: Any, param: Any) -> None:
        raise CheckpointError(
            f"tensor {param_name!r} has shape {list(param.shape)}, and the model's has {list(expected.shape)}",
            holding(param_name, self._files),
            param_name,
        )

    def create_quantized_param(  # type: ignore[override]
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        path = param_name.rpartition(".")[0]
        if isinstance(param_value, QuantizedWeight):
            made: QuantizedWeight | None = QuantizedWeight(param_value.to(target_device))
        else:
            made = quantized(param_value, self._scheme, torch.device(target_device))
        if made is None:
            raise NonFiniteWeightError([path])
        model.get_submodule(path)._parameters["weight"] = made  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self._parts:
            name = next(iter(self._parts))
            other = self._names.weight_of(name) is not None
            kind = "a scale without quantized values" if other else "quantized values without a scale"
            raise CheckpointError(f"tensor {name!r} is {kind}", holding(name, self._files), name)
        choices = self._choices(model)
        for choice in choices:
            if choice.reason is None:
                choice.reason = "not in FP8 in the checkpoint"
        remember(model, choices, self.options)
        self._wanted = {}
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return split(state_dict), metadata_of(state_dict)

    def _dequantize(self, model: Any) -> Any:
        quantize.dequantize(model)
        # diffusers leaves the entry, and would look for quantized weights where such a model was saved.
        config = {name: value for name, value in model.config.items() if name != "quantization_config"}
        model._internal_dict = FrozenDict(config)  # type: ignore[no-untyped-call]
        return model


def config_of(options: Fp8Options) -> Fp8DiffusionConfig:
    """What a configuration holds of ``options``."""
    return Fp8DiffusionConfig(**options.of_weights())


def attach(model: Any, options: Fp8Options) -> None:
    """Let a diffusers model that `quantize_` converted be saved as one that diffusers loaded."""
    modeling = sys.modules.get("diffusers.models.modeling_utils")
    if modeling is None or not isinstance(model, modeling.ModelMixin):
        return
    if not isinstance(getattr(model, "hf_quantizer", None), (Fp8DiffusionQuantizer, NoneType)):
        return
    config = config_of(options)
    model.hf_quantizer = Fp8DiffusionQuantizer(config, pre_quantized=False)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)


AUTO_QUANTIZER_MAPPING[QuantMethod.FP8_DIFFUSION.value] = Fp8DiffusionQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.FP8_DIFFUSION.value] = Fp8DiffusionConfig
quantize.on_converted.append(attach)
