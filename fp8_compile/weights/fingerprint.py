"""Whether a weight has changed, by its values."""

from __future__ import annotations

import torch
from torch import Tensor

# Words hashed at a time: what bounds the memory that hashing a large weight takes, 8 bytes a word and a few of them.
_CHUNK = 1 << 22


def fingerprint(weight: Tensor) -> Tensor:
    """A 64-bit hash of the values of ``weight`` and their places, computed on its device.

    Each word of bits is mixed with its place by the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), and the results are added modulo 2**64. Without the mixing, an even
    number of sign flips would cancel out: the sign is the highest bit of a word, and twice that is 0.

    Args:
        weight: any shape, any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        int64, without dimensions.
    """
    flat = weight.detach().contiguous().view(-1)
    word = next(t for t in (torch.int64, torch.int16, torch.int8) if flat.numel() * flat.itemsize % t.itemsize == 0)
    if flat.data_ptr() % word.itemsize:
        flat = flat.clone()
    bits = flat.view(word)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
        total += _mix(chunk ^ _mix(place)).sum()
    return total


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ _logical_shift(x, shift)) * factor
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
