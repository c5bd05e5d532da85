"""FP8 inference for diffusion transformers, as a ``torch.compile`` backend named "fp8_diffusion"."""

from typing import TYPE_CHECKING, Any

from . import embedded
from .calibration import Calibration, calibrate, load_calibration
from .errors import (
    CalibrationError,
    CheckpointError,
    Fp8Error,
    GradientError,
    NonFiniteWeightError,
    NothingConvertedError,
    NothingConvertedWarning,
    NotInstalledError,
    OptionError,
    PatternError,
    QuantizedWeightError,
    RecompileLimitWarning,
    UncalibratedLayersWarning,
    UnknownMethodError,
    UnmatchedPatternWarning,
    UnsupportedDeviceError,
    UnusedScaleWarning,
)
from .integrations import registration
from .integrations.checkpoints import load_fp8_checkpoint, save_fp8_checkpoint
from .options import Fp8Options
from .quantize import quantize_
from .recipes import recommended
from .report import report
from .runtime.constants import refresh
from .schemes import Call, Scheme, Spec, high_precision, register_method
from .version import __version__
from .weights.quantized_weight import QuantizedWeight, rebuild_quantized_weight

if TYPE_CHECKING:
    from .integrations.diffusers import Fp8DiffusionConfig

__all__ = [
    "Calibration",
    "CalibrationError",
    "Call",
    "CheckpointError",
    "Fp8DiffusionConfig",
    "Fp8Error",
    "Fp8Options",
    "GradientError",
    "NonFiniteWeightError",
    "NotInstalledError",
    "NothingConvertedError",
    "NothingConvertedWarning",
    "OptionError",
    "PatternError",
    "QuantizedWeight",
    "QuantizedWeightError",
    "RecompileLimitWarning",
    "Scheme",
    "Spec",
    "UncalibratedLayersWarning",
    "UnknownMethodError",
    "UnmatchedPatternWarning",
    "UnsupportedDeviceError",
    "UnusedScaleWarning",
    "__version__",
    "calibrate",
    "embedded",
    "high_precision",
    "load_calibration",
    "load_fp8_checkpoint",
    "quantize_",
    "rebuild_quantized_weight",
    "recommended",
    "refresh",
    "register_method",
    "report",
    "save_fp8_checkpoint",
]

registration.register()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name != "Fp8DiffusionConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import diffusers.quantizers.auto  # noqa: F401 # it registers ours when it is complete
    except ModuleNotFoundError as error:
        return _missing(name, str(error.name).partition(".")[0])
    from .integrations.diffusers import Fp8DiffusionConfig

    return Fp8DiffusionConfig


def _missing(name: str, needed: str) -> type:
    """What stands for the class ``name`` where the package ``needed`` is not installed: looking it up is no error."""

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(f"{name} needs {needed}: pip install 'fp8-compile[cli]'", name=needed)

    return type(name, (), {"__init__": fail, "__doc__": f"Needs {needed}, which is not installed."})
