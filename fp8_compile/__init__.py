"""FP8 inference for diffusion transformers, as a ``torch.compile`` backend named "fp8_diffusion"."""

from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    Fp8Error,
    Fp8WeightError,
    GradientError,
    NonFiniteWeightError,
    NothingConvertedError,
    NothingConvertedWarning,
    OptionError,
    PatternError,
    UnmatchedPatternWarning,
    UnsupportedDeviceError,
)
from .integrations import registration
from .integrations.checkpoints import load_fp8_checkpoint, save_fp8_checkpoint
from .options import Fp8Options
from .quantize import quantize_
from .report import report
from .runtime.binder import refresh
from .schemes.fp8 import Scheme, register_method
from .weights.quantized_weight import Fp8Weight

if TYPE_CHECKING:
    from .integrations.diffusers import Fp8DiffusionConfig

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Fp8DiffusionConfig",
    "Fp8Error",
    "Fp8Options",
    "Fp8Weight",
    "Fp8WeightError",
    "GradientError",
    "NonFiniteWeightError",
    "NothingConvertedError",
    "NothingConvertedWarning",
    "OptionError",
    "PatternError",
    "Scheme",
    "UnmatchedPatternWarning",
    "UnsupportedDeviceError",
    "load_fp8_checkpoint",
    "quantize_",
    "refresh",
    "register_method",
    "report",
    "save_fp8_checkpoint",
]

registration.register()


def __getattr__(name: str) -> Any:
    if name == "Fp8DiffusionConfig":  # imports diffusers
        from .integrations.diffusers import Fp8DiffusionConfig

        return Fp8DiffusionConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
