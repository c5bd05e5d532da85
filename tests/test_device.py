"""What a device refuses; asked of the CPU, which has kernels for everything, with schemes that have none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8_compile import block_scales, numerics
from fp8_compile.device import refusal
from fp8_compile.schemes import Call
from fp8_compile.schemes.fp8 import (
    BLOCK_SIZES,
    BLOCKS,
    EXPERTS,
    ROWWISE,
    ROWWISE_UNFUSED_SCALES,
    TENSORWISE,
    WEIGHT_ONLY,
    Fp8,
)

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


@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [(256, 256), (208, 304), (3072, 512)], ids=str)
def test_what_has_a_reference_is_compared_with_it(
    size: tuple[int, int], dtype: torch.dtype, features: tuple[int, int]
) -> None:
    scheme, state = Fp8(weight_block_size=size), torch.random.get_rng_state()
    assert refusal(scheme, BLOCKS[size], CPU, 130, features, dtype, True) is None
    assert torch.equal(torch.random.get_rng_state(), state)


def transposed(scale: Tensor) -> Tensor:
    return scale.t().reshape(scale.shape)


def neighbours(scale: Tensor) -> Tensor:
    return scale.roll(1, -1)


def one_wrong(scale: Tensor) -> Tensor:
    return torch.cat([torch.cat([scale[:1, 1:2], scale[:1, 1:]], 1), scale[1:]])


@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("wrong", [transposed, neighbours, one_wrong])
@pytest.mark.parametrize("operand", ["x", "weight"])
def test_a_kernel_that_reads_another_scale_is_refused(size: tuple[int, int], wrong: Any, operand: str) -> None:
    """As those that read it in another order were, which gave pictures that looked like those of coarse scales."""

    def linear(x: Any, weight: Tensor, scale: Tensor, *more: Any) -> Tensor:
        if operand == "x":
            return block_scales.blockwise_linear((x[0], wrong(x[1])), weight, scale, *more)
        return block_scales.blockwise_linear(x, weight, wrong(scale), *more)

    call = replace(BLOCKS[size], linear=linear)
    reason = refusal(Fp8(weight_block_size=size), call, CPU, 256, (512, 256), torch.bfloat16, False)
    assert reason is not None
    assert reason.startswith("cpu refuses 256 x 512 by 512 x 256: a result is wrong by ")


def test_what_cannot_be_compared_is_refused() -> None:
    def none_left(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for call, expected in (
        (replace(BLOCKS[128, 128], reference=none_left), "cpu refuses 16 x 256 by 256 x 256: CUDA out of memory"),
        (replace(BLOCKS[128, 128], linear=none_left, reference=None), None),
    ):
        scheme = Fp8(weight_block_size=(128, 128))
        assert refusal(scheme, call, CPU, 16, (256, 256), torch.bfloat16, False) == expected


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


def test_a_kernel_for_experts_is_compared() -> None:
    asked = (CPU, 60, (64, 32), torch.bfloat16, False, 6)
    assert refusal(Fp8(), EXPERTS, *asked) is None

    def shifted(x: Any, weight: Tensor, *more: Any) -> Tensor:
        return numerics.grouped_then_scale(x, weight.roll(1, 0), *more)

    reason = refusal(Fp8(), replace(EXPERTS, linear=shifted), *asked)
    assert reason is not None
    assert reason.startswith("cpu refuses 40 x 64 by 64 x 32: a result is wrong by")  # tokens of 4 of the 6 experts
