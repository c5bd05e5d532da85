"""A histogram of magnitudes that needs no range beforehand, so that those of several calls simply add up.

The bin of a value is the upper bits of its float32: the exponent and the first 5 bits of the mantissa. An octave,
``[2**e, 2**(e + 1))``, has 32 bins of equal width, 1/32 of its lower edge; relative to the values in it a bin is 3.1 %
wide at the beginning of an octave and 1.6 % at its end. A shift finds the bin, and all of float32 has a place, from
zero to infinity. HdrHistogram (http://hdrhistogram.org) is made alike.

A bfloat16 is the upper half of a float32, so its bins are found without a conversion.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS_PER_OCTAVE = 32
BINS = 256 * BINS_PER_OCTAVE
FINITE_BINS = 255 * BINS_PER_OCTAVE
"""The bins from here on count Inf and NaN."""

_SHIFT = 18

# Values counted at a time: what bounds the memory that counting takes, to about 20 bytes for each of them.
_CHUNK = 1 << 24


def bin_edges() -> Tensor:
    """The edges of the finite bins, ``[FINITE_BINS + 1]`` float64; the last one is the end of float32's range."""
    bits = torch.arange(FINITE_BINS + 1, dtype=torch.int32) << _SHIFT
    edges = bits.view(torch.float32).double()
    edges[-1] = 2.0**128
    return edges


def bin_of(magnitudes: Tensor) -> Tensor:
    """The bins of ``magnitudes``, float32 and not negative; int64 of their shape."""
    return (magnitudes.contiguous().view(torch.int32) >> _SHIFT).long()


def count(x: Tensor) -> tuple[Tensor, Tensor]:
    """Count the magnitudes of ``x``, on its device and without waiting for it.

    Args:
        x: any shape, floating point, on a device.

    Returns:
        The counts, ``[BINS]`` int64, and the largest finite ``|x|`` as the bits of a float32, int32 without dimensions;
        0 if there is none.
    """
    chunks = [_count(chunk) for chunk in torch.split(x.detach().reshape(-1), _CHUNK) if chunk.numel()]
    if not chunks:
        return torch.zeros(BINS, dtype=torch.int64, device=x.device), torch.zeros(
            (), dtype=torch.int32, device=x.device
        )
    counts, amax = chunks[0]
    for more, larger in chunks[1:]:
        counts, amax = counts + more, torch.maximum(amax, larger)
    return counts.long(), amax


def _count(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.bfloat16:
        bits, infinite, unit = x.view(torch.int16) & 0x7FFF, 0x7F80, 16
    else:
        bits, infinite, unit = x.float().view(torch.int32) & 0x7FFFFFFF, 0x7F800000, 0
    amax = torch.where(bits < infinite, bits, 0).amax().int() << unit
    return _bincount(bits >> (_SHIFT - unit)), amax


def _bincount(bins: Tensor) -> Tensor:
    if bins.device.type == "cpu":
        return torch.bincount(bins, minlength=BINS)
    # bincount waits for a GPU, to learn the largest value. histc of integers counts in these, exactly.
    if bins.device.type == "cuda":
        return torch.histc(bins.int(), bins=BINS, min=0, max=BINS)
    zeros = torch.zeros(BINS, dtype=torch.int64, device=bins.device)
    return zeros.scatter_add_(0, bins.long(), torch.ones_like(bins, dtype=torch.int64))
