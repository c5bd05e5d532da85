"""torchao's FP8 weights, used as they are."""

from __future__ import annotations

from torch import Tensor

from .. import quantize
from ..errors import QuantizedWeightError
from ..numerics import FP8_DTYPE
from ..schemes import scheme_named
from ..weights.quantized_weight import WEIGHT_DTYPES, QuantizedWeight


def adopt(weight: Tensor) -> QuantizedWeight | None:
    """torchao's ``Float8Tensor`` as a `QuantizedWeight` in the same memory; None if ``weight`` is no such thing.

    Other formats than E4M3, and blocks that `Fp8` does not have, are not taken over.
    """
    if type(weight).__name__ != "Float8Tensor" or not type(weight).__module__.startswith("torchao."):
        return None
    qdata, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]
    if qdata.dim() != 2 or qdata.dtype != FP8_DTYPE or weight.dtype not in WEIGHT_DTYPES:
        return None
    try:
        scheme, constants = scheme_named("fp8", {}).read({"": qdata, "_scale": scale})
    except QuantizedWeightError:
        return None
    return QuantizedWeight(scheme, constants, weight.dtype)


quantize.adopters.append(adopt)
