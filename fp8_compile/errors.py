"""The errors and warnings of this package.

What is raised while a graph compiles reaches the user inside ``torch._dynamo.exc.BackendCompilerFailed``, as with every
backend; its ``inner_exception`` is the error below. Every message names the offending value and the remedy.
"""

from __future__ import annotations

from collections.abc import Sequence


class Fp8Error(Exception):
    """Base of every error that this package raises."""


class OptionError(Fp8Error, ValueError):
    """An option is unknown, or has a value that it cannot have."""


class NotInstalledError(OptionError):
    """What was asked for is in a package that is not installed; the message says how to get it."""


class UnknownMethodError(OptionError):
    """A weight, a file or the user names a method that is not registered."""


class PatternError(Fp8Error, ValueError):
    """An entry of ``ignored_layers`` or ``layers`` is malformed or misspelt, or names unnamed layers."""

    def __init__(self, pattern: object, problem: str, option: str = "ignored_layers") -> None:
        super().__init__(f"{option}: {pattern!r}: {problem}")
        self.pattern = pattern


class GradientError(Fp8Error, RuntimeError):
    """The graph was compiled with gradients enabled for an input that requires them."""


class UnsupportedDeviceError(Fp8Error, RuntimeError):
    """The device of the weights has no FP8 matrix multiplication."""


class NonFiniteWeightError(Fp8Error, ValueError):
    """A weight holds NaN or Inf, so it has no scale.

    Attributes:
        layers: module paths of the layers.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__(
            f"NaN or Inf in the weight of {', '.join(map(repr, layers))}: such a weight cannot be quantized. "
            f"Check the checkpoint, or keep the layer with ignored_layers=[{', '.join(map(repr, layers))}]."
        )
        self.layers = tuple(layers)


class QuantizedWeightError(Fp8Error, ValueError):
    """Something that a `QuantizedWeight` cannot be made of, or cannot do.

    Attributes:
        suffix: of the constant that is wrong, behind the weight's name in files.
    """

    def __init__(self, problem: str, suffix: str = "") -> None:
        super().__init__(problem)
        self.suffix = suffix


class CheckpointError(Fp8Error, ValueError):
    """A file does not hold what it should, or cannot be written.

    Attributes:
        files: where the tensor was looked for; the one that holds it where that is known.
        tensor: its name, or None.
    """

    def __init__(self, problem: str, files: Sequence[object], tensor: str | None = None) -> None:
        super().__init__(f"{', '.join(map(str, files)) or 'checkpoint'}: {problem}")
        self.files = tuple(map(str, files))
        self.tensor = tensor


class CalibrationError(Fp8Error, ValueError):
    """A calibration that found nothing, is of another model, cannot give scales, or cannot be read or written.

    Attributes:
        layers: paths of the layers that have no scale, where that is the reason.
        file: what was read or written, or None.
    """

    def __init__(self, problem: str, layers: Sequence[str] = (), file: object = None) -> None:
        super().__init__(problem if file is None else f"{file}: {problem}")
        self.layers = tuple(layers)
        self.file = None if file is None else str(file)


class NothingConvertedError(Fp8Error, RuntimeError):
    """None of the linears was quantized, or at load time not all that should.

    Raised under ``strict=True`` and by the command line.
    """


class NothingConvertedWarning(UserWarning):
    """Linears were found, and none of them was quantized, or at load time not all that should."""


class UnmatchedPatternWarning(UserWarning):
    """An entry of ``ignored_layers`` or ``layers`` matched no linear of a model."""


class UnusedScaleWarning(UserWarning):
    """A file has scales of activations that cannot be used with its weights."""


class UncalibratedLayersWarning(UserWarning):
    """Linears of a model did not run while it was calibrated: they have no static scale."""


class RecompileLimitWarning(UserWarning):
    """Dynamo will compile no further graph of a function: layers that need another one run in high precision."""
