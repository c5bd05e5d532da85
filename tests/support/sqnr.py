"""Signal-to-quantization-noise ratio, the measure of numerical quality in these tests."""

import torch
from torch import Tensor


def sqnr(reference: Tensor, value: Tensor) -> float:
    """``10 log10(|reference|^2 / |reference - value|^2)`` in dB; infinite for equal tensors."""
    reference, value = reference.double(), value.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - value).square().sum()))
