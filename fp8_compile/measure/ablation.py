"""The result of an ablation, and how it is written as JSON."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

from ..errors import Fp8Error
from .quality import Comparison, Sample
from .results import quality_to_dict, quartiles

BASELINE = "compiled BF16"
"""The name of the row that all others are compared with."""


class AblationError(Fp8Error, ValueError):
    """A choice of layers, or a call, that cannot be measured."""


@dataclass(frozen=True)
class AblationRow:
    """One configuration.

    Attributes:
        ignored_layers: its patterns; None for `BASELINE`.
        fp8_layers: how many linears are in FP8.
        fp8_attentions: how many attentions are.
        weight_bytes: what compiled code reads of all linear weights of the denoisers, FP8 and others.
        step_seconds: of every timed step.
        peak_bytes: the most GPU memory that generating a picture took, above what was in use before; None on other
            devices.
        samples: its pictures.
        quality: against `BASELINE`; None for itself.
        prompt_adherence: per attribute (right, of), where all prompts are captions of `scenes`; else None.
        failure: the error that ended its measurement, or empty. What had not been measured then is empty, zero or None.
    """

    name: str
    ignored_layers: tuple[str, ...] | None
    fp8_layers: int = 0
    fp8_attentions: int = 0
    weight_bytes: int = 0
    step_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    samples: tuple[Sample, ...] = ()
    quality: Comparison | None = None
    prompt_adherence: dict[str, tuple[int, int]] | None = None
    failure: str = ""


@dataclass(frozen=True)
class Ablation:
    """What `ablate` found; the first row is `BASELINE`.

    Attributes:
        model: class of the pipeline.
        settings: what was asked for.
        environment: where it was measured.
    """

    model: str
    rows: tuple[AblationRow, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def speedup(self, row: AblationRow) -> float:
        """``median(baseline) / median(row)`` of the seconds of a step; NaN where it was not timed."""
        if not row.step_seconds or not self.rows[0].step_seconds:
            return math.nan
        return statistics.median(self.rows[0].step_seconds) / statistics.median(row.step_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the pictures, as plain data. A PSNR of None is infinite: the pictures are equal."""
        return {
            "model": self.model,
            "settings": self.settings,
            "environment": self.environment,
            "rows": [
                {
                    "name": row.name,
                    "ignored_layers": None if row.ignored_layers is None else list(row.ignored_layers),
                    "fp8_layers": row.fp8_layers,
                    "fp8_attentions": row.fp8_attentions,
                    "weight_bytes": row.weight_bytes,
                    "step_seconds": dict(zip(("low", "median", "high"), quartiles(row.step_seconds), strict=True))
                    if row.step_seconds
                    else None,
                    "step_seconds_samples": list(row.step_seconds),
                    "speedup": self.speedup(row) if row.step_seconds and self.rows[0].step_seconds else None,
                    "peak_bytes": row.peak_bytes,
                    "quality": None if row.quality is None else quality_to_dict(row.quality),
                    "prompt_adherence": row.prompt_adherence,
                    "failure": row.failure,
                }
                for row in self.rows
            ],
        }

    def json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
