"""FP8 weights through transformers' ``from_pretrained(quantization_config=...)``, as pipelines load text encoders.

Imports transformers, and is imported, and registered in its tables, as soon as transformers and diffusers are
(`integrations`). Needs transformers 5, whose loading hands each tensor to the quantizer as it arrives.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from .. import quantize
from ..checks import with_recipe
from ..errors import CheckpointError
from ..options import Fp8Options
from ..quantize import Choice, check_at_load, check_choices, check_scales, choose, quantized
from ..weights.eligible import QUANTIZABLE_DTYPES
from .diffusers import Fp8DiffusionConfig, QuantMethod, config_of, finish
from .stored_weights import fp8_in


class Fp8TransformersQuantizer(HfQuantizer):
    """Turns each weight into FP8 as it arrives. What it loads cannot be saved by ``save_pretrained``."""

    quantized_element_size = 1
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Fp8DiffusionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]
        self.options = quantization_config.options
        check_at_load(self.options)
        self._wanted: dict[str, Choice] = {}
        self._device_map: dict[str, Any] = {}

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[Any] | None = None, **_: Any
    ) -> nn.Module:
        for file, name in fp8_in(checkpoint_files or []):
            raise CheckpointError(
                f"tensor {name!r} is in FP8: from_pretrained would not use its scale; read a text encoder's FP8 file "
                "by load_fp8_checkpoint",
                [file],
                name,
            )
        self.options = with_recipe(self.options, model, stacklevel=3)
        choices = choose(model, self.options)
        check_scales(model, choices, self.options)
        check_choices(model, choices, self.options)
        self._wanted = {name: c for c in choices if c.reason is None for name in c.parameters}
        return model

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Called again when ``device_map="auto"`` is decided."""
        if isinstance(device_map, dict):
            self._device_map = device_map

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """What goes to the disk is written there as plain arrays."""
        return param_name in self._wanted and self._device(param_name) != "disk"

    def _device(self, name: str) -> Any:
        while name and name not in self._device_map:
            name = name.rpartition(".")[0]
        return self._device_map.get(name)

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        quantize.dequantize(model)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._wanted)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        finish(model, choose(model, self.options), self.options)
        return model


def attach(model: nn.Module, options: Fp8Options) -> None:
    """Let ``save_pretrained`` refuse what was converted in memory in the words that it has for what was loaded so."""
    modeling = sys.modules.get("transformers.modeling_utils")
    for module in model.modules() if modeling is not None else ():
        if isinstance(module, modeling.PreTrainedModel) and not hasattr(module, "hf_quantizer"):  # type: ignore[union-attr]
            module.hf_quantizer = Fp8TransformersQuantizer(config_of(options), pre_quantized=False)


class _Quantize(ConversionOps):
    def __init__(self, wanted: Mapping[str, Choice]) -> None:
        self._wanted = wanted

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Leaves alone what transformers keeps in float32, and weights with NaN or Inf, which are an error later."""
        made = {}
        for name, given in input_dict.items():
            value: Tensor = given[0] if isinstance(given, list) else given
            wanted = self._wanted.get(name) if value.dtype in QUANTIZABLE_DTYPES else None
            fp8 = None if wanted is None else quantized(value, wanted.scheme)
            made[name] = value if fp8 is None else fp8
        return made


AUTO_QUANTIZER_MAPPING[QuantMethod.FP8_DIFFUSION.value] = Fp8TransformersQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.FP8_DIFFUSION.value] = Fp8DiffusionConfig
quantize.on_converted.append(attach)
