"""FlashAttention 3, by aten's own operator for FP8: compute capability 9.0 exactly.

Its kernels come with the package flash_attn_interface, which is built from FlashAttention's source (``hopper/``) and is
not on PyPI. torch then calls them for every flash attention of the process, in BF16 as well, so that is done here only,
when a graph needs it, and the report says so. `restore` takes it back.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor

from ..numerics import as_written
from .kernel import Kernel, Question
from .operands import quantize, softmax_scale

logger = logging.getLogger(__name__)

PACKAGE = "flash_attn_interface"
_HEAD_SIZES = (64, 128, 256)


def reason(question: Question) -> str | None:
    """Why FlashAttention 3 cannot compute what is asked, or None."""
    if question.capability != (9, 0):
        return "FlashAttention 3 needs compute capability 9.0"
    if question.head_size not in _HEAD_SIZES or question.value_size != question.head_size:
        sizes = ", ".join(map(str, _HEAD_SIZES))
        return f"FlashAttention 3 has FP8 for head sizes {sizes}, not {question.head_size}"
    if importlib.util.find_spec(PACKAGE) is None:
        return f"FlashAttention 3 needs the package {PACKAGE}"
    active = _attention.current_flash_attention_impl()
    if active not in (None, "FA3"):
        return f"torch.nn.attention has {active} active, which FlashAttention 3 would replace"
    return None


@as_written
def attention_flash3(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dtype: torch.dtype) -> Tensor:
    """See `Kernel.attention`; the kernel itself gives bfloat16."""
    o = quantize(query, key, value)
    operator = torch.ops.aten._scaled_dot_product_flash_attention.quantized
    scales = o.query_scale, o.key_scale, o.value_scale
    out: Tensor = operator(o.query, o.key, o.value, *scales, scale=softmax_scale(scale, query))[0]
    return out.to(dtype)


_attention: Any = torch.nn.attention
_ours = False


ACTIVE = "FlashAttention 3 computes all flash attentions of this process, also those in BF16"


def activate() -> str:
    """Let torch call FlashAttention 3 for the flash attentions of this process, unless it does already.

    Returns:
        What the report says of it.

    Raises:
        ImportError, RuntimeError: the package cannot be loaded, or has other kernels.
    """
    global _ours
    if _attention.current_flash_attention_impl() != "FA3":
        _attention.activate_flash_attention_impl("FA3")
        _ours = True
        logger.warning(ACTIVE)
    return ACTIVE


def restore() -> None:
    """Take back what `activate` did, if it did something. Graphs that are compiled with this kernel fail then."""
    global _ours
    if _ours:
        _attention.restore_flash_attention_impl()
        _ours = False


FLASH3 = Kernel("fp8-flash3", reason, attention_flash3, activate)
