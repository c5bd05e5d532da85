"""FP8 inference for diffusion transformers, as a ``torch.compile`` backend named "fp8_diffusion"."""

from .errors import (
    Fp8Error,
    GradientError,
    NonFiniteWeightError,
    NothingConvertedError,
    NothingConvertedWarning,
    OptionError,
    PatternError,
    UnmatchedPatternWarning,
    UnsupportedDeviceError,
)
from .options import Fp8Options
from .report import report
from .schemes import Scheme, register_method
from .weights import refresh

__version__ = "0.1.0"

__all__ = [
    "Fp8Error",
    "Fp8Options",
    "GradientError",
    "NonFiniteWeightError",
    "NothingConvertedError",
    "NothingConvertedWarning",
    "OptionError",
    "PatternError",
    "Scheme",
    "UnmatchedPatternWarning",
    "UnsupportedDeviceError",
    "refresh",
    "register_method",
    "report",
]
