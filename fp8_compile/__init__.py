"""FP8 inference for diffusion transformers, as a ``torch.compile`` backend named "fp8_diffusion"."""

from .errors import (
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
from .fp8_weight import Fp8Weight
from .load import quantize_
from .options import Fp8Options
from .report import report
from .schemes import Scheme, register_method
from .weights import refresh

__version__ = "0.1.0"

__all__ = [
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
    "quantize_",
    "refresh",
    "register_method",
    "report",
]
