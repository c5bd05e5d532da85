"""From a histogram of magnitudes to a clipping value, and what becomes of the values under it.

The clipping value is what E4M3's largest, 448, stands for: the scale is the clipping value / 448, and larger
magnitudes saturate. Maximum and percentile: Wu, Judd, Zhang, Isaev and Micikevicius, "Integer quantization for deep
learning inference: principles and empirical evaluation" (arXiv:2004.09602). The least squared error: Sakr et al.,
"Optimal clipping and magnitude-aware differentiation for improved quantization-aware training" (arXiv:2206.06501), who
search with Newton's method; here all candidates are tried.

Both papers are about integers. E4M3 keeps its relative precision over 15 octaves, so clipping gains far less than there
(Kuzmin et al., "FP8 quantization: the power of the exponent", arXiv:2208.09225): compare pictures before you choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..numerics import FP8_DTYPE, FP8_MAX
from .histogram import BINS_PER_OCTAVE, FINITE_BINS, bin_edges, bin_of

ALGORITHMS = ("amax", "percentile", "mse")

DEFAULT_PERCENTILE = 99.99

SMALLEST_NORMAL = 2.0**-6
"""Of E4M3. Smaller codes are a fixed step of 2**-9 apart: the relative error grows as values shrink."""

SMALLEST_KEPT = 2.0**-10
"""Half of E4M3's smallest code, 2**-9: what is not larger is rounded to zero."""

# How far below the amax clipping values are tried. E4M3's normal range is 14.8 octaves; nobody cuts away half of it.
_SEARCH = 8 * BINS_PER_OCTAVE

# Points in each bin at which the error is taken. A step of E4M3 spans four bins of its octave or more.
_POINTS = 8

# Elements of an intermediate result: 8 MB of float64.
_ELEMENTS = 1 << 20


def check_algorithm(algorithm: object, percentile: object) -> None:
    """Refuse what `clipping` does not know.

    Raises:
        OptionError: ``algorithm`` is none of `ALGORITHMS`, or ``percentile`` is no number above 0 and up to 100.
    """
    if algorithm not in ALGORITHMS:
        raise OptionError(f"algorithm={algorithm!r} is not valid; valid: {', '.join(ALGORITHMS)}")
    if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 0 < percentile <= 100:
        raise OptionError(f"percentile={percentile!r}: expected a number above 0 and up to 100, such as 99.99")


def clipping(counts: Tensor, amax: Tensor, algorithm: str, percentile: float = DEFAULT_PERCENTILE) -> Tensor:
    """The clipping values of layers.

    Args:
        counts: ``[L, FINITE_BINS]`` int64.
        amax: ``[L]`` float64: the largest magnitudes that were counted.
        algorithm: "amax": what was seen is not clipped. "percentile": so many percent of the magnitudes, zeros among
            them, are not larger; linear within a bin. "mse": the smallest expected squared error, among the edges of
            bins up to 8 octaves below the amax.

    Returns:
        ``[L]`` float64, at most ``amax``. Against the values themselves: "amax" is exact; "percentile" and "mse" are
        off by at most a bin, 3.1 %.
    """
    if algorithm == "amax" or len(counts) == 0:
        return amax
    found = _percentile(counts, percentile) if algorithm == "percentile" else _least_error(counts, amax)
    return torch.minimum(found, amax)


def _percentile(counts: Tensor, percentile: float) -> Tensor:
    edges, total = bin_edges(), counts.cumsum(1)
    rank = total[:, -1:].double() * (percentile / 100)
    place = torch.searchsorted(total.double(), rank).clamp(max=FINITE_BINS - 1)
    inside = counts.gather(1, place).double()
    share = 1 - (total.gather(1, place).double() - rank) / inside.clamp(min=1)
    return (edges[place] + share * (edges[place + 1] - edges[place])).squeeze(1)


def _least_error(counts: Tensor, amax: Tensor) -> Tensor:
    """The upper edge of the bin at which the expected squared error is least; the larger one of equals."""
    edges = bin_edges()
    used = counts.any(0).nonzero().squeeze(1)
    if len(used) == 0:
        return amax
    top = bin_of(amax.float())
    candidates = torch.cat([torch.arange(max(0, t - _SEARCH), t + 1) for t in set(top.tolist())])
    candidates = torch.unique(candidates).flip(0)
    points = _points(used)
    errors = torch.cat(
        [
            _squared_error(points.unsqueeze(-1), edges[some + 1]).mean(1)
            for some in torch.split(candidates, max(1, _ELEMENTS // points.numel()))
        ],
        dim=1,
    )
    expected = counts[:, used].double() @ errors
    tried = (candidates <= top.unsqueeze(1)) & (candidates >= top.unsqueeze(1) - _SEARCH)
    return edges[candidates[expected.masked_fill(~tried, torch.inf).argmin(1)] + 1]


def _points(bins: Tensor) -> Tensor:
    """Magnitudes that stand for the bins: evenly spread in each, ``[bins, _POINTS]`` float64."""
    edges = bin_edges()
    inside = (torch.arange(_POINTS, dtype=torch.float64) + 0.5) / _POINTS
    return edges[bins].unsqueeze(1) + (edges[bins + 1] - edges[bins]).unsqueeze(1) * inside


def _squared_error(x: Tensor, clip: Tensor) -> Tensor:
    """Of ``x``, float64, in E4M3 under ``clip``: to nearest even, with subnormals, saturating."""
    scale = clip / FP8_MAX
    codes = (x / scale).clamp(max=FP8_MAX).float().to(FP8_DTYPE).double()
    return (codes * scale - x).square()


@dataclass(frozen=True)
class Fit:
    """What becomes of a layer's input under one scale.

    Attributes:
        sqnr: signal to quantization noise, dB; infinite without noise. Large values dominate it: where a few are
            thousands of times the others, it says nothing of those.
        subnormal: the share of the values that are not zero below E4M3's smallest normal number. Their relative error
            is larger than the 2**-4 (at most) of normal ones.
        flushed: the share of the values that are not zero that become zero.
        clipped: the share of all values that saturate.
    """

    sqnr: float
    subnormal: float
    flushed: float
    clipped: float


def fit(counts: Tensor, amax: float, clip: float) -> Fit:
    """How the values of a histogram, ``[FINITE_BINS]``, of which ``amax`` is the largest, fare under ``clip``."""
    used = counts.nonzero().squeeze(1)
    points, weights = _points(used).clamp(max=amax), counts[used].double()
    each = (weights.unsqueeze(1) / _POINTS).expand_as(points)
    noise = float((_squared_error(points, torch.tensor(clip, dtype=torch.float64)) * each).sum())
    signal = float((points.square() * each).sum())
    sqnr = 10 * float(torch.log10(torch.tensor(signal / noise, dtype=torch.float64))) if noise else torch.inf
    # The lowest bin holds the zeros.
    others = float(weights[used > 0].sum())
    below = (used > 0).unsqueeze(1) * each
    scale = clip / FP8_MAX

    def share(limit: float) -> float:
        return float(below[points <= limit * scale].sum()) / others if others else 0.0

    clipped = float(each[points > clip].sum()) / float(weights.sum())
    return Fit(sqnr, share(SMALLEST_NORMAL), share(SMALLEST_KEPT), clipped)
