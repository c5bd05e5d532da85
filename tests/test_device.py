"""What a device refuses; asked of the CPU, which has kernels for everything, with schemes that have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8_compile import numerics
from fp8_compile.device import refusal
from fp8_compile.schemes import Call
from fp8_compile.schemes.fp8 import ROWWISE, ROWWISE_UNFUSED_SCALES, TENSORWISE, WEIGHT_ONLY, Fp8

CPU = torch.device("cpu")


def refusing(limit: int) -> Call:
    """A call whose kernel takes no fewer than ``limit`` rows."""

    def linear(x: Any, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if x[0].shape[0] < limit:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling something")
        return numerics.scaled_linear(x, weight, scale, bias, dtype)

    return replace(ROWWISE, name="refusing", linear=linear)


@pytest.mark.parametrize("call", [ROWWISE, ROWWISE_UNFUSED_SCALES, TENSORWISE, WEIGHT_ONLY], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_refused_here(call: Call, dtype: torch.dtype) -> None:
    scheme = Fp8(granularity="tensor" if call is TENSORWISE else "row")
    assert refusal(scheme, call, CPU, 24, (64, 32), dtype, True) is None


def test_the_reason_names_the_shape_and_the_first_line_of_the_error() -> None:
    reason = refusal(Fp8(), refusing(257), CPU, 256, (64, 32), torch.bfloat16, True)
    assert reason == "cpu refuses 256 x 64 by 64 x 32: CUBLAS_STATUS_NOT_SUPPORTED"
    assert refusal(Fp8(), refusing(257), CPU, 257, (64, 32), torch.bfloat16, False) is None


def test_a_size_known_only_at_run_time_is_asked_of_small_and_large_ones() -> None:
    """The graph will run with any number of rows, and may not fail in the middle of a picture."""
    asked = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        asked.extend(x for x in inputs if isinstance(x, torch.SymInt))
        return gm.forward

    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(4096, 64))
    rows = next(size for size in asked if size.node.hint == 4096)
    assert refusal(Fp8(), refusing(257), CPU, rows, (64, 32), torch.bfloat16, False) is not None
    assert refusal(Fp8(), refusing(1), CPU, rows, (64, 32), torch.bfloat16, False) is None


def test_real_tensors_are_used_within_a_fake_mode() -> None:
    with FakeTensorMode():
        assert refusal(Fp8(), refusing(257), CPU, 100, (64, 32), torch.bfloat16, False) is not None
