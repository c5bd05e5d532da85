"""Attention in FP8: what a kernel takes (`operands`), one file per kernel, and their table.

Only what a kernel takes without its user's patching: torch's own cuDNN attention takes no descales, and the package
sageattention on PyPI multiplies int8 by Triton kernels that no graph can name.
"""

from __future__ import annotations

from .emulated import EMULATED
from .flash3 import FLASH3
from .flex import FLEX
from .kernel import Kernel, Question

KERNELS: dict[str, tuple[Kernel, ...]] = {
    "fp8": (FLASH3, FLEX),
    "fp8-emulated": (EMULATED,),
}
"""By the value of the option ``attention``: kernels, the fastest first."""


def choose(option: str, question: Question) -> tuple[Kernel | None, str]:
    """The first kernel that computes what is asked, or None; and why those before it do not."""
    reasons: list[str] = []
    for kernel in KERNELS[option]:
        reason = kernel.reason(question)
        if reason is None:
            return kernel, "; ".join(reasons)
        reasons.append(reason)
    # On another device than a GPU no kernel has more to say than the last one.
    return None, reasons[-1] if question.capability is None else "; ".join(reasons)
