from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fp8_compile import numerics
from fp8_compile.numerics import (
    FP8_DTYPE,
    FP8_MAX,
    dequantize,
    linear_then_scale,
    quantize_rowwise,
    quantize_tensorwise,
    scaled_linear,
    weight_only_linear,
)
from tests.support.sqnr import sqnr

Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]
QUANTIZE: dict[str, Quantize] = {"row": quantize_rowwise, "tensor": quantize_tensorwise}
GRANULARITIES = list(QUANTIZE)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    return torch.compile(function, backend="aot_eager", fullgraph=True)(*args)


def eager(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@pytest.fixture(params=[eager, compiled], ids=["eager", "compiled"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_format() -> None:
    assert torch.float8_e4m3fn == FP8_DTYPE
    assert FP8_MAX == 448


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_each_row(dtype: torch.dtype, call: Callable[..., Any]) -> None:
    x = gaussian(2, 5, 48, dtype=dtype)
    values, scale = call(quantize_rowwise, x)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, (2, 5, 48))
    assert (scale.dtype, scale.shape) == (torch.float32, (2, 5, 1))
    expected = torch.tensor([[max(map(abs, row)) for row in rows] for rows in x.tolist()]).unsqueeze(-1) / 448
    torch.testing.assert_close(scale, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_the_tensor(dtype: torch.dtype, call: Callable[..., Any]) -> None:
    x = gaussian(2, 5, 48, dtype=dtype)
    values, scale = call(quantize_tensorwise, x)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, (2, 5, 48))
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert scale == torch.tensor(max(map(abs, x.flatten().tolist()))) / 448


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_are_the_nearest_of_the_format(granularity: str, call: Callable[..., Any]) -> None:
    x = gaussian(7, 64)
    values, scale = call(QUANTIZE[granularity], x)
    bits = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).double()
    representable = bits[bits.isfinite()]
    exact = x.double() / scale.double()
    nearest = (exact.unsqueeze(-1) - representable).abs().amin(-1)
    error = (values.double() - exact).abs()
    # The product with a rounded reciprocal may fall on the other side of a midpoint, by three roundings of it.
    assert (error <= nearest + 3 * 448 * 2.0**-24).all()


def test_largest_value_of_each_row_is_the_largest_of_the_format() -> None:
    x = gaussian(512, 64) * torch.logspace(-30, 30, 512).unsqueeze(-1)
    values, _ = quantize_rowwise(x.to(torch.bfloat16))
    assert (values.float().abs().amax(-1) == 448).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros(granularity: str, dtype: torch.dtype, call: Callable[..., Any]) -> None:
    values, scale = call(QUANTIZE[granularity], torch.zeros(3, 32, dtype=dtype))
    assert (values.float() == 0).all()
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (dequantize(values, scale, dtype) == 0).all()


def test_row_of_zeros_among_others() -> None:
    x = gaussian(3, 32)
    x[1] = 0
    values, scale = quantize_rowwise(x)
    back = dequantize(values, scale, torch.bfloat16)
    assert (back[1] == 0).all()
    assert sqnr(x[[0, 2]], back[[0, 2]]) > 28


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(value: float, call: Callable[..., Any]) -> None:
    x = gaussian(4, 32)
    clean = quantize_rowwise(x)
    x[2, 5] = value
    values, scale = call(quantize_rowwise, x)
    back = dequantize(values, scale, torch.float32)
    assert not back[2].isfinite().any()
    if math.isnan(value):
        assert back[2].isnan().all()
    else:
        assert scale[2] == math.inf
    others = [0, 1, 3]
    for now, before in zip((values, scale), clean, strict=True):
        torch.testing.assert_close(now[others].float(), before[others].float(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden_by_a_single_scale(value: float) -> None:
    x = gaussian(4, 32)
    x[2, 5] = value
    assert not dequantize(*quantize_tensorwise(x), torch.float32).isfinite().any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_reaches_the_result_of_a_linear(granularity: str) -> None:
    x = gaussian(4, 32)
    x[2, 5] = math.nan
    quantize = QUANTIZE[granularity]
    out = scaled_linear(quantize(x), *quantize(gaussian(16, 32)), None, torch.bfloat16)
    assert out[2].isnan().all()
    if granularity == "row":
        assert out[[0, 1, 3]].isfinite().all()


def every_bfloat16() -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_the_rounding_is_torchs_cast() -> None:
    """For every bfloat16, and every mantissa of a float32 in three exponents: ties, subnormals, and beyond 448."""
    mantissas = torch.arange(1 << 23, dtype=torch.int32)
    values = [every_bfloat16().float(), *((mantissas | ((127 + e) << 23)).view(torch.float32) for e in (-8, 0, 8))]
    for x in values:
        expected = x.clamp(-448, 448).to(FP8_DTYPE).float()
        torch.testing.assert_close(numerics.rounded_to_e4m3(x), expected, rtol=0, atol=0, equal_nan=True)


def test_the_decoding_is_torchs_cast() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE)
    torch.testing.assert_close(numerics.decoded_e4m3(codes), codes.float(), rtol=0, atol=0, equal_nan=True)


def test_the_decoding_by_words_is_torchs_cast() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).view(4, 64)
    torch.testing.assert_close(numerics.decoded_by_words(codes), codes.float(), rtol=0, atol=0, equal_nan=True)


def test_an_amax_by_bits_is_that_of_floats() -> None:
    """For pairs of all bfloat16 values, NaN and infinities included, and for float32."""
    values = every_bfloat16()
    pairs = torch.stack([values, values[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]], dim=1)
    for x in (pairs, pairs.float() * 1.00001, gaussian(64, 64, dtype=torch.float32)):
        by_bits, by_floats = (numerics._amax(x, (-1,), by_bits=how) for how in (True, False))
        assert torch.equal(by_bits.isnan(), by_floats.isnan())
        assert torch.equal(by_bits.nan_to_num(), by_floats.nan_to_num())


def test_no_activation_needs_a_clamp() -> None:
    """All bfloat16 values, each as the largest of a row and beside a larger one."""
    values = every_bfloat16()
    finite = values[values.isfinite()].unsqueeze(-1)
    for x in (finite, torch.cat([finite, finite / 3, -finite / 7], dim=1)):
        quantized, scale = quantize_rowwise(x)
        assert quantized.float().isfinite().all()
        assert (x.float() / scale).abs().max() < 448.001


@pytest.mark.parametrize("shape", [(64, 3072), (16, 15360)])
def test_an_activation_takes_the_codes_of_a_division_but_for_a_few(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    (fast, scale), (exact, same) = quantize_rowwise(x), numerics.quantize_weight_rowwise(x)
    assert torch.equal(scale, same)
    assert (fast.view(torch.uint8) != exact.view(torch.uint8)).float().mean() < 1e-3
    quality = [sqnr(x.double(), dequantize(values, scale, torch.float64)) for values in (fast, exact)]
    assert abs(quality[0] - quality[1]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smallest_and_largest_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([[info.max, -info.max / 2], [info.tiny, -info.tiny], [info.max, info.tiny]]).to(dtype)
    back = dequantize(*quantize_rowwise(x), torch.float64)
    torch.testing.assert_close(back[:2], x[:2].double(), rtol=2**-4, atol=0)
    assert back[2, 1] == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)], ids=str)
def test_no_rows(granularity: str, shape: tuple[int, ...], call: Callable[..., Any]) -> None:
    quantize = QUANTIZE[granularity]
    weight = quantize(gaussian(16, 32))
    values, scale = call(quantize, torch.empty(shape, dtype=torch.bfloat16))
    assert (values.dtype, values.shape) == (FP8_DTYPE, shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (*shape[:-1], 1) if granularity == "row" else ())
    assert scale.isfinite().all()
    for bias in (None, gaussian(16)):
        out = call(scaled_linear, (values, scale), *weight, bias, torch.bfloat16)
        assert (out.dtype, out.shape) == (torch.bfloat16, (*shape[:-1], 16))


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: gaussian(64, 8).t(),
    "transposed middle": lambda: gaussian(2, 8, 3, 64).transpose(1, 2),
    "channels last": lambda: gaussian(2, 64, 4, 5).permute(0, 2, 3, 1),
    "strided": lambda: gaussian(8, 128)[:, ::2],
    "expanded": lambda: gaussian(1, 64).expand(8, 64),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_is_contiguous_for_any_layout(granularity: str, layout: str, call: Callable[..., Any]) -> None:
    x = LAYOUTS[layout]()
    assert not x.is_contiguous()
    values, scale = call(QUANTIZE[granularity], x)
    expected, expected_scale = QUANTIZE[granularity](x.contiguous())
    assert values.is_contiguous()
    torch.testing.assert_close(values.float(), expected.float(), rtol=0, atol=0)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_of_any_layout(granularity: str, layout: str) -> None:
    x, quantize = LAYOUTS[layout](), QUANTIZE[granularity]
    weight = quantize(gaussian(32, 64))
    out = scaled_linear(quantize(x), *weight, None, torch.bfloat16)
    expected = scaled_linear(quantize(x.contiguous()), *weight, None, torch.bfloat16)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, -448.0, 0.0], [0.5, 2.0, -0.25]]).to(FP8_DTYPE)
    back = dequantize(values, torch.tensor([[2.0], [4.0]]), dtype)
    assert back.dtype == dtype
    assert back.tolist() == [[2, -896, 0], [2, 8, -1]]
    assert dequantize(values, torch.tensor(0.5), dtype).tolist() == [[0.5, -224, 0], [0.25, 1, -0.125]]


def reference(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """The linear of the values that the operands stand for, in float64."""
    operands = (values.double() * scale.double() for values, scale in (x, weight))
    return F.linear(*operands, bias if bias is None else bias.double())


# Rounding to the type of the result, and what accumulating 64 products in float32 adds; relative to the largest result.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-18}


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without instructions for bfloat16, and on one with them."""
    monkeypatch.setattr(numerics, "CPU_HAS_BFLOAT16", request.param)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "plain"])
@pytest.mark.parametrize("lead", [(), (8,), (2, 4), (2, 2, 2), (1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_linear_agrees_with_float64(
    granularity: str,
    dtype: torch.dtype,
    bias: bool,
    lead: tuple[int, ...],
    kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tolerance is that of one rounding to the type of the result: the bias is added before it, not after."""
    if kernel and granularity == "row" and torch.__version__ < (2, 12):
        pytest.skip("this torch has no row-wise kernel for the CPU")
    monkeypatch.setattr(numerics, "has_kernel", lambda device_type: kernel)
    monkeypatch.setattr(numerics, "CPU_HAS_BFLOAT16", False)
    quantize = QUANTIZE[granularity]
    x, weight = quantize(gaussian(*lead, 64)), quantize(gaussian(48, 64))
    b = gaussian(48, dtype=dtype) if bias else None
    out = scaled_linear(x, *weight, b, dtype)
    expected = reference(x, weight, b)
    assert (out.dtype, out.shape) == (dtype, (*lead, 48))
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=2**-18 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_linear_with_a_bias_of_another_type(granularity: str, dtype: torch.dtype) -> None:
    quantize = QUANTIZE[granularity]
    x, weight, bias = quantize(gaussian(8, 64)), quantize(gaussian(48, 64)), gaussian(48, dtype=torch.float32)
    out = scaled_linear(x, *weight, bias, dtype)
    assert out.dtype == dtype
    assert sqnr(reference(x, weight, bias), out) > 45


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_traced_linear_is_the_eager_one(granularity: str, dtype: torch.dtype) -> None:
    quantize = QUANTIZE[granularity]

    def function(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        return scaled_linear(quantize(x), weight, weight_scale, bias, dtype)

    args = gaussian(2, 8, 64, dtype=dtype), *quantize(gaussian(48, 64, dtype=dtype)), gaussian(48, dtype=dtype)
    traced = make_fx(function, tracing_mode="fake")(*args)  # as AOTAutograd traces it
    torch.testing.assert_close(traced(*args), function(*args), rtol=0, atol=0)


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="this torch has no row-wise kernel for the CPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_plain_operators_agree_with_torchs_kernel(
    dtype: torch.dtype, bias: bool, products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = quantize_rowwise(gaussian(2, 8, 64)), quantize_rowwise(gaussian(48, 64))
    b = gaussian(48, dtype=dtype) if bias else None
    plain = scaled_linear(x, *weight, b, dtype)
    monkeypatch.setattr(numerics, "has_kernel", lambda device_type: True)
    by_kernel = scaled_linear(x, *weight, b, dtype)
    assert plain.dtype == by_kernel.dtype
    assert sqnr(by_kernel, plain) > 45


def loss(x: Tensor, weight: Tensor, granularity: str) -> float:
    quantize = QUANTIZE[granularity]
    out = scaled_linear(quantize(x), *quantize(weight), None, torch.bfloat16)
    return sqnr(F.linear(x.double(), weight.double()), out)


def test_quality_on_gaussian_data() -> None:
    """E4M3 keeps 3 bits of mantissa: about 31 dB for each operand, 3 less for their product."""
    x, weight = gaussian(256, 512), gaussian(128, 512)
    assert sqnr(x, dequantize(*quantize_rowwise(x), torch.float32)) > 31
    assert loss(x, weight, "row") > 28
    assert loss(x, weight, "tensor") > 28


def test_rows_of_very_different_size() -> None:
    """Below 2**-9 of a unit nothing is left: a huge row takes the others' bits, unless each row has its scale."""
    x, weight = gaussian(256, 512), gaussian(128, 512)
    x[7] *= 1e5
    others = torch.arange(256) != 7

    def quality(granularity: str) -> float:
        quantize = QUANTIZE[granularity]
        out = scaled_linear(quantize(x), *quantize(weight), None, torch.bfloat16)
        return sqnr(F.linear(x[others].double(), weight.double()), out[others])

    assert quality("row") > 28
    assert quality("tensor") < 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 1), (0,)], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weight_only_linear_agrees_with_float64(
    granularity: str, lead: tuple[int, ...], bias: bool, dtype: torch.dtype, call: Callable[..., Any]
) -> None:
    x, weight = gaussian(*lead, 64, dtype=dtype), QUANTIZE[granularity](gaussian(48, 64))
    b = gaussian(48, dtype=dtype) if bias else None
    out = call(weight_only_linear, x, *weight, b, dtype)
    expected = reference((x, torch.ones(())), weight, b)
    assert (out.dtype, out.shape) == (dtype, (*lead, 48))
    largest = float(expected.abs().max()) if expected.numel() else 0
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=2**-18 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lead", [(8,), (2, 4), (0,)], ids=str)
def test_scaling_afterwards_agrees_with_float64(
    lead: tuple[int, ...], bias: bool, dtype: torch.dtype, call: Callable[..., Any]
) -> None:
    """The sums are rounded to bfloat16 before the scales, whatever the type of the result."""
    x, weight = quantize_rowwise(gaussian(*lead, 64, dtype=dtype)), quantize_rowwise(gaussian(48, 64))
    b = gaussian(48, dtype=dtype) if bias else None
    out = call(linear_then_scale, x, *weight, b, dtype)
    assert (out.dtype, out.shape) == (dtype, (*lead, 48))
    expected = reference(x, weight, None)
    allowed = 2**-8 * expected.abs()
    expected = expected if b is None else expected + b.double()
    assert bool(((out.double() - expected).abs() <= allowed + TOLERANCE[dtype] * expected.abs() + 2**-18).all())


def test_scaling_afterwards_does_not_overflow() -> None:
    x, weight = (quantize_rowwise(torch.full((16, 4096), 3e38, dtype=torch.bfloat16)) for _ in range(2))
    small = x[0], x[1] * 1e-38, weight[0], weight[1] * 1e-38
    out = linear_then_scale(small[:2], *small[2:], None, torch.bfloat16)
    torch.testing.assert_close(out, torch.full((16, 16), 4096 * 9.0, dtype=torch.bfloat16), rtol=0.02, atol=0)
