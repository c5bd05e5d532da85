"""The quality that a search is asked for."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Fp8Error
from .quality import METRICS

STATISTICS = ("worst", "mean")


class SearchError(Fp8Error, ValueError):
    """A search that cannot be made, or cannot be resumed with these settings."""


@dataclass(frozen=True)
class Bound:
    """The quality that is asked for.

    Attributes:
        metric: one of `quality.METRICS`.
        value: the greatest that is good enough where less is better (relative L2, LPIPS), else the least (PSNR in dB,
            SSIM, cosine).
        statistic: of all pictures, "worst" or "mean".

    Raises:
        SearchError: the metric or the statistic is not valid, or the metric cannot have that value.
    """

    metric: str
    value: float
    statistic: str = "worst"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise SearchError(f"metric={self.metric!r} is not valid; valid: {', '.join(METRICS)}")
        if self.statistic not in STATISTICS:
            raise SearchError(f"statistic={self.statistic!r} is not valid; valid: {', '.join(STATISTICS)}")
        highest = 1.0 if self.metric in ("ssim", "cosine") else math.inf
        if isinstance(self.value, bool) or not isinstance(self.value, numbers.Real):
            raise SearchError(f"bound for {self.metric}: expected a number, got {self.value!r}")
        if not 0 < self.value <= highest or math.isinf(self.value):
            valid = "above 0" + (" and at most 1" if highest == 1 else "")
            raise SearchError(f"bound for {self.metric}: expected a number {valid}, got {self.value!r}")

    @property
    def less_is_better(self) -> bool:
        """Whether a smaller value of the metric means a picture nearer to its reference."""
        return METRICS[self.metric] is min

    def of(self, quality: Mapping[str, Any]) -> float:
        """The value that the bound is for, from what `quality_to_dict` made; an infinite PSNR is None there."""
        value = quality[self.statistic][self.metric]
        return math.inf if value is None else float(value)

    def loss(self, value: float) -> float:
        """``value`` turned so that less is better; NaN is worst."""
        if math.isnan(value):
            return math.inf
        return value if self.less_is_better else -value

    def met(self, value: float) -> bool:
        """Whether ``value`` is good enough."""
        return self.loss(value) <= self.loss(self.value)

    def __str__(self) -> str:
        which = "of the worst picture" if self.statistic == "worst" else "in the mean of all pictures"
        return f"{self.metric} {which} {'at most' if self.less_is_better else 'at least'} {self.value:g}"
