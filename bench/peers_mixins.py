"""The tests that diffusers has for each of its quantization libraries, for ours: subclasses of its own mixins.

Importable only where `bench.peers_plugin` runs, beside diffusers' tests.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.models import testing_utils as theirs

from fp8_compile import Fp8DiffusionConfig
from fp8_compile.weights.quantized_weight import QuantizedWeight

from .peers_plugin import RUN, WEIGHTS, to_bf16

RUNNING = (
    "quantization_inference",
    "quantization_lora_inference",
    "quantization_device_map",
    "quantization_cpu_device_map",
    "quantization_training",
    "torch_compile",
    "torch_compile_with_group_offload",
)
OF_WEIGHTS = (
    "quantization_num_parameters",
    "quantization_memory_footprint",
    "quantization_config_serialization",
    "original_dtype",
    "quantized_layers",
    "keep_modules_in_fp32",
    "dequantize",
)
of_weights = pytest.mark.skipif(RUN == "stock", reason="nothing is quantized")


class Fp8Mixin(theirs.QuantizationCompileTesterMixin, theirs.QuantizationTesterMixin):
    """Each of their checks that torchao's mixin has, on a checkpoint in BF16 that is made from the tests' own model.

    With ``RUN == "stock"`` nothing is quantized: what fails then does so for another reason.
    """

    @property
    def pretrained_model_name_or_path(self) -> str:
        return self.folder

    @property
    def pretrained_model_kwargs(self) -> dict[str, Any]:
        return {"torch_dtype": torch.bfloat16}

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16

    @pytest.fixture(autouse=True)
    def _checkpoint(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folder = str(tmp_path_factory.mktemp("bf16"))
        torch.manual_seed(0)
        model = self.model_class(**self.get_init_dict())
        to_bf16(model)
        model.save_pretrained(self.folder)

    def _create_quantized_model(self, config: dict[str, Any], **kwargs: Any) -> torch.nn.Module:
        if RUN != "stock":
            kwargs["quantization_config"] = Fp8DiffusionConfig(**config)
        return self.model_class.from_pretrained(self.folder, **self.pretrained_model_kwargs, **kwargs)

    def _verify_if_layer_quantized(self, name: str, module: torch.nn.Linear, config: dict[str, Any]) -> None:
        narrow = name and any(features % 16 for features in (module.in_features, module.out_features))
        assert narrow or isinstance(module.weight, QuantizedWeight), f"{name} is {type(module.weight)}"

    @pytest.mark.parametrize("granularity", ["row", "tensor"])
    @pytest.mark.parametrize("check", RUNNING)
    def test_fp8_runs(self, check: str, granularity: str) -> None:
        getattr(self, f"_test_{check}")({**WEIGHTS, "granularity": granularity})

    @of_weights
    @pytest.mark.parametrize("granularity", ["row", "tensor"])
    @pytest.mark.parametrize("check", OF_WEIGHTS)
    def test_fp8_weights(self, check: str, granularity: str) -> None:
        getattr(self, f"_test_{check}")({**WEIGHTS, "granularity": granularity})

    @of_weights
    @pytest.mark.parametrize("size", [None, "4KB"])
    @pytest.mark.parametrize("granularity", ["row", "tensor"])
    def test_fp8_serialization(self, granularity: str, size: str | None, tmp_path: Any) -> None:
        self._test_quantization_serialization({**WEIGHTS, "granularity": granularity}, tmp_path, max_shard_size=size)

    @of_weights
    def test_fp8_modules_to_not_convert(self) -> None:
        excluded = getattr(self, "modules_to_not_convert_for_test", None)
        if excluded is None:  # the last layer that becomes FP8
            model = self._create_quantized_model(WEIGHTS)
            excluded = [p for p, m in model.named_modules() if isinstance(getattr(m, "weight", None), QuantizedWeight)][
                -1:
            ]
        self._test_quantization_modules_to_not_convert(WEIGHTS, excluded, exclusion_key="ignored_layers")


def further(kind: type, module: ModuleType) -> dict[str, type]:
    """Our tests of the model that ``kind`` tests, by name; and diffusers' compile tests, where ``module`` has none."""
    if not issubclass(kind, theirs.ModelTesterMixin):
        return {}
    mixins = {"Fp8": Fp8Mixin}
    tests = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    if not any(issubclass(test, theirs.TorchCompileTesterMixin) for test in tests):
        mixins["Compile"] = theirs.TorchCompileTesterMixin
    config = next(base for base in kind.__bases__ if issubclass(base, theirs.BaseModelTesterConfig))
    return {
        kind.__name__ + suffix: type(kind.__name__ + suffix, (mixin, config), {"__module__": module.__name__})
        for suffix, mixin in mixins.items()
    }


def part(kind: type | None) -> str | None:
    """Which part of the suite a class of tests belongs to; None if it is none of our concern."""
    if kind is None:
        return None
    parts = {
        theirs.TorchCompileTesterMixin: "compile",
        theirs.LoraHotSwappingForModelTesterMixin: "hot-swapping",
        Fp8Mixin: "quantization",
    }
    return next((name for mixin, name in parts.items() if issubclass(kind, mixin)), None)
