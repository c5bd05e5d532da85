"""Text encoders of a pipeline in FP8, for their memory: not compiled, they make BF16 of a weight at each use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..options import RECOMMENDED
from ..quantize import quantize_
from ..recipes import recipe_of
from ..weights.quantized_weight import QuantizedWeight
from .denoisers import PipelineError


@dataclass(frozen=True)
class EncoderRecord:
    """What became of one text encoder.

    Attributes:
        name: in the pipeline.
        kind: its class.
        weights: how many were converted.
        bytes_before, bytes_after: of all its parameters.
        reason: why it stays as it is; None where it was converted.
    """

    name: str
    kind: str
    weights: int
    bytes_before: int
    bytes_after: int
    reason: str | None


def quantize_text_encoders(pipe: Any, method: str, device: str) -> tuple[EncoderRecord, ...]:
    """Convert the text encoders of ``pipe`` that have a recipe, but for what it keeps, on their way to ``device``.

    Args:
        method: see `Fp8Options`.

    Raises:
        OptionError: there is no such method.
        PipelineError: none can be converted.
    """
    found = {name: module for name, module in vars(pipe).items() if name.startswith("text_encoder")}
    records = tuple(
        _quantize(name, module, method, device) for name, module in found.items() if isinstance(module, nn.Module)
    )
    if not any(record.weights for record in records):
        reasons = "; ".join(f"{record.name} ({record.kind}): {record.reason}" for record in records) or "there is none"
        raise PipelineError(f"no text encoder of {type(pipe).__name__} can be quantized: {reasons}")
    return records


def _quantize(name: str, module: nn.Module, method: str, device: str) -> EncoderRecord:
    kind, before = type(module).__name__, _bytes(module)
    recipe = recipe_of(module)
    if recipe is None:
        return EncoderRecord(name, kind, 0, before, before, "there is no recipe for it")
    if "*" in recipe.keep:
        return EncoderRecord(name, kind, 0, before, before, "its recipe keeps all of it")
    quantize_(module, {"method": method, "ignored_layers": [RECOMMENDED], "strict": True}, device)
    weights = sum(isinstance(parameter, QuantizedWeight) for parameter in module.parameters())
    return EncoderRecord(name, kind, weights, before, _bytes(module), None)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
