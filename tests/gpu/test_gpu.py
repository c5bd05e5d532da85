"""Every kernel path on a real GPU; without one, each test is skipped, and says so."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8_compile
from fp8_compile import block_scales, numerics
from fp8_compile.attention import KERNELS, flash3
from fp8_compile.attention.emulated import attention_emulated
from fp8_compile.attention.kernel import Kernel, Question
from fp8_compile.calibration import histogram
from fp8_compile.device import refusal
from fp8_compile.runtime import constants
from fp8_compile.schemes import ONES, Call, int8
from fp8_compile.schemes.fp8 import (
    BLOCK_SIZES,
    BLOCKS,
    DEQUANTIZED_BLOCKS,
    EXPERTS,
    EXPERTS_DECODED,
    EXPERTS_DEQUANTIZED,
    ROWWISE,
    ROWWISE_UNFUSED_SCALES,
    STATIC_ROWWISE,
    STATIC_TENSORWISE,
    STATIC_UNFUSED,
    TENSORWISE,
    WEIGHT_ONLY,
    WEIGHT_ONLY_BLOCKS,
    Fp8,
)
from fp8_compile.schemes.int8 import Int8, int8_linear, int8_quantize_rowwise, int8_quantize_weight
from tests.support.blocks import WIDTH, Model
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

AVAILABLE = torch.cuda.is_available() and torch.version.hip is None
pytestmark = pytest.mark.skipif(
    not AVAILABLE or torch.cuda.get_device_capability() < Fp8.min_capability,
    reason="needs an NVIDIA GPU of compute capability 8.9 or higher",
)
CUDA = torch.device("cuda:0")
OPTIONS: dict[str, Any] = {"min_features": WIDTH}


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=CUDA, dtype=dtype)


def model(dtype: torch.dtype = torch.bfloat16) -> Model:
    return Model(3).to(CUDA, dtype).eval()


def run(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m(x)


# --- kernels ---


@pytest.mark.parametrize("call", [ROWWISE, ROWWISE_UNFUSED_SCALES, TENSORWISE, WEIGHT_ONLY], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 127, 1024])
@pytest.mark.parametrize("features", [(64, 64), (3072, 144), (144, 3072)], ids=str)
def test_kernel_agrees_with_float64(
    call: Call, dtype: torch.dtype, bias: bool, rows: int, features: tuple[int, int]
) -> None:
    k, n = features
    scheme = Fp8("tensor" if call is TENSORWISE else "row")
    if (reason := refusal(scheme, call, CUDA, rows, features, dtype, bias)) is not None:
        pytest.skip(reason)
    x, w, b = gaussian(rows, k, dtype=dtype), gaussian(n, k, dtype=dtype), gaussian(n, dtype=dtype) if bias else None
    quantized = x if call.quantize is None else call.quantize(x)
    values, scale = scheme.quantize_weight(w)
    assert call.linear is not None
    out = call.linear(quantized, values, scale, b, dtype)
    left = x.double() if call.quantize is None else quantized[0].double() * quantized[1].double()
    expected = left @ (values.double() * scale.double()).t() + (0 if b is None else b.double())
    assert out.dtype == dtype
    assert sqnr(expected, out) > 44  # fast accumulation keeps 14 bits of the sums; bfloat16 alone would give 50


@pytest.mark.parametrize("call", [EXPERTS, EXPERTS_DEQUANTIZED, EXPERTS_DECODED], ids=lambda c: c.linear.__name__)
@pytest.mark.parametrize("features", [(64, 64), (2048, 2688), (1344, 2048)], ids=str)
def test_experts_agree_with_float64(call: Call, features: tuple[int, int]) -> None:
    """With experts of no token, of a few and of an odd number."""
    (k, n), scheme, ends = features, Fp8(), [0, 3, 130, 131, 256]
    if (reason := refusal(scheme, call, CUDA, 256, features, torch.bfloat16, False, len(ends))) is not None:
        pytest.skip(reason)
    x, w = gaussian(256, k), gaussian(len(ends), k, n)
    values, scale = scheme.quantize_stack(w)
    assert call.linear is not None
    quantized = x if call.quantize is None else call.quantize(x)
    offs = torch.tensor(ends, dtype=torch.int32, device=CUDA)
    out = call.linear(quantized, values, scale, offs, torch.bfloat16)
    left = x.double() if call.quantize is None else quantized[0].double() * quantized[1].double()
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        expected = left[start:end] @ (values[i].double() * scale[i].double()).t()
        assert start == end or sqnr(expected, out[start:end]) > 44


@pytest.mark.parametrize("call", [STATIC_ROWWISE, STATIC_UNFUSED, STATIC_TENSORWISE], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [8, 127, 1024])
@pytest.mark.parametrize("features", [(64, 64), (3072, 144), (144, 3072)], ids=str)
def test_static_scales_agree_with_float64(
    call: Call, dtype: torch.dtype, bias: bool, rows: int, features: tuple[int, int]
) -> None:
    """Also beyond the clamp; and the bytes are those that the CPU makes."""
    k, n = features
    scheme = Fp8("tensor" if call is STATIC_TENSORWISE else "row", "static", input_scale=3 / 448)
    if (reason := refusal(scheme, call, CUDA, rows, features, dtype, bias)) is not None:
        pytest.skip(reason)
    x, w, b = gaussian(rows, k, dtype=dtype), gaussian(n, k, dtype=dtype), gaussian(n, dtype=dtype) if bias else None
    constants = scheme.quantize_weight(w)
    named = {**dict(zip(scheme.specs(n, k), constants, strict=True)), ONES: torch.ones(2048, 1, device=CUDA)}
    assert call.quantize is not None
    assert call.linear is not None
    quantized = call.quantize(x, *(named[name] for name in call.takes))
    out = call.linear(quantized, *call.operands_of(named), b, dtype)
    left = quantized[0].double() * float(named["input_scale"])
    expected = left @ (constants[0].double() * constants[1].double()).t() + (0 if b is None else b.double())
    assert out.dtype == dtype
    assert sqnr(expected, out) > 44
    there = call.quantize(x.cpu(), *(named[name].cpu() for name in call.takes))[0]
    assert torch.equal(there.view(torch.uint8), quantized[0].cpu().view(torch.uint8))


@pytest.mark.parametrize("kernel", KERNELS["fp8"], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "tokens", "size"), [((4, 4), 1024, 128), ((4, 2), 333, 64)])
def test_attention_agrees_with_float64(
    kernel: Kernel,
    dtype: torch.dtype,
    heads: tuple[int, int],
    tokens: int,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a key head for each query head, and with one for two; and it loses no more than the emulation says."""
    question = Question(CUDA, torch.cuda.get_device_capability(), size, size, inductor=True)
    if (reason := kernel.reason(question)) is not None:
        pytest.skip(reason)
    monkeypatch.setitem(KERNELS, "fp8", (kernel,))
    q, k, v = (gaussian(2, n, tokens, size, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    attention = torch.nn.functional.scaled_dot_product_attention
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, enable_gqa=True), backend="fp8_diffusion", options={"attention": "fp8"}
    )
    try:
        with torch.no_grad():
            out = compiled(q, k, v)
    finally:
        flash3.restore()
    expected = attention(q.double(), k.double(), v.double(), enable_gqa=True)
    emulated = sqnr(expected, attention_emulated(q, k, v, None, dtype))
    assert out.dtype == dtype
    assert emulated - 2 < sqnr(expected, out) < emulated + 1  # more than that would not be FP8


@pytest.mark.parametrize("rows", [1, 8, 16, 17, 18, 31, 33, 127, 1024])
@pytest.mark.parametrize("features", [(64, 64), (3072, 136), (136, 3072), (15360, 3072)], ids=str)
def test_int8_sums_are_exact(rows: int, features: tuple[int, int]) -> None:
    """Of the largest codes, too; with rows of padding up to 16."""
    k, n = features
    for values, weight in (
        (torch.randint(-127, 128, (rows, k)), torch.randint(-127, 128, (n, k))),
        (torch.full((rows, k), 127), torch.full((n, k), -127)),
    ):
        here = values.to(torch.int8), weight.to(torch.int8)
        sums = int8.sums_by_kernel(*(codes.to(CUDA) for codes in here))
        assert torch.equal(sums.cpu(), int8.sums_in_float32(*here))


@pytest.mark.parametrize("call", [int8.ROWWISE, int8.WEIGHT_ONLY], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 127, 1024])
@pytest.mark.parametrize("features", [(64, 64), (3072, 136), (136, 3072)], ids=str)
def test_int8_agrees_with_float64(
    call: Call, dtype: torch.dtype, bias: bool, rows: int, features: tuple[int, int]
) -> None:
    k, n = features
    assert refusal(Int8(), call, CUDA, rows, features, dtype, bias) is None
    x, w, b = gaussian(rows, k, dtype=dtype), gaussian(n, k, dtype=dtype), gaussian(n, dtype=dtype) if bias else None
    quantized = x if call.quantize is None else call.quantize(x)
    codes, scale = int8_quantize_weight(w)
    assert call.linear is not None
    out = call.linear(quantized, codes, scale, b, dtype)
    left = x.double() if call.quantize is None else quantized[0].double() * quantized[1].double()
    expected = left @ (codes.double() * scale.double()).t() + (0 if b is None else b.double())
    assert out.dtype == dtype
    assert sqnr(expected, out) > 48


@pytest.mark.parametrize("k", [3072, 9216, 12288])
@pytest.mark.parametrize("rows", [8, 14, 127, 256, 257])
def test_long_rows_and_few_of_them(k: int, rows: int) -> None:
    """Where https://github.com/pytorch/ao/issues/4582 refuses, the fallback must not."""
    reasons = [
        refusal(Fp8(), c, CUDA, rows, (k, 3072), torch.bfloat16, True) for c in (ROWWISE, ROWWISE_UNFUSED_SCALES)
    ]
    assert None in reasons, reasons


BLOCKWISE = pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
HOPPER = pytest.mark.skipif(
    not AVAILABLE or torch.cuda.get_device_capability()[0] != 9, reason="only compute capability 9 has the kernel"
)


@HOPPER
@BLOCKWISE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [8, 127, 130, 1024])
@pytest.mark.parametrize("features", [(256, 256), (3072, 3072), (640, 144), (12288, 3072), (3072, 12288)], ids=str)
def test_blocks_agree_with_float64(
    size: tuple[int, int], dtype: torch.dtype, bias: bool, rows: int, features: tuple[int, int]
) -> None:
    """Also where the blocks of K are no multiple of 4, and rows none either: what silent errors were made of."""
    k, n = features
    assert refusal(Fp8(weight_block_size=size), BLOCKS[size], CUDA, rows, features, dtype, bias) is None
    sizes = torch.randn(1, k, device=CUDA).exp()
    x, w = (gaussian(count, k, dtype=torch.float32) * sizes for count in (rows, n))
    b = gaussian(n, dtype=dtype) if bias else None
    (values, scale), made = (
        block_scales.quantize_blockwise(x.to(dtype)),
        block_scales.quantize_weight(w.to(dtype), size[0]),
    )
    out = block_scales.blockwise_linear((values, scale), *made, b, dtype)
    left = values.double() * scale.double().t().repeat_interleave(128, -1)
    right = made[0].double() * made[1].double().repeat_interleave(size[0], 0)[:n].repeat_interleave(128, 1)
    expected = left @ right.t() + (0 if b is None else b.double())
    assert out.dtype == dtype
    assert sqnr(expected, out) > 44
    assert float((out.double() - expected).abs().max()) < 0.05 * float(expected.abs().max())


@BLOCKWISE
@pytest.mark.parametrize("features", [(200 * 16, 3072), (208, 304)], ids=str)
def test_features_that_do_not_divide_run_or_are_refused(size: tuple[int, int], features: tuple[int, int]) -> None:
    k, n = features
    m = nn.Linear(k, n).to(CUDA, torch.bfloat16)
    x = gaussian(256, k)
    expected = run(m, x)
    options = {"weight_block_size": list(size), "min_features": 16}
    got = run(torch.compile(m, backend="fp8_diffusion", fullgraph=True, options=options), x)
    assert sqnr(expected, got) > 26
    (row,) = fp8_compile.report(m).layers
    refused = refusal(Fp8(weight_block_size=size), BLOCKS[size], CUDA, 256, features, torch.bfloat16, True)
    assert (row.scheme, row.reason) == (
        (BLOCKS[size].name, "") if refused is None else (DEQUANTIZED_BLOCKS.name, refused)
    )


@BLOCKWISE
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_blocks_compiled(size: tuple[int, int], mode: str) -> None:
    """On Hopper by the kernel, elsewhere by the dequantized weight; in neither case by a Triton template for blocks."""
    m = nn.Sequential(nn.Linear(640, 1024), nn.GELU(), nn.Linear(1024, 640)).to(CUDA, torch.bfloat16)
    for rows in (128, 130, 77):
        x = gaussian(1, rows, 640)
        expected = run(m, x)
        options = {"weight_block_size": list(size), "mode": mode}
        compiled = torch.compile(m, backend="fp8_diffusion", fullgraph=True, options=options)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert sqnr(expected, run(compiled, x)) > 26
    hopper = torch.cuda.get_device_capability()[0] == 9
    name = BLOCKS[size].name if hopper else DEQUANTIZED_BLOCKS.name
    assert {row.scheme for row in fp8_compile.report(m).layers} == {name}


@BLOCKWISE
@pytest.mark.parametrize("call", [WEIGHT_ONLY_BLOCKS, DEQUANTIZED_BLOCKS], ids=["few", "many"])
def test_dequantized_blocks(size: tuple[int, int], call: Call) -> None:
    made = block_scales.quantize_weight(gaussian(304, 208), size[0])
    x = gaussian(3, 208)
    assert call.linear is not None
    got = torch.compile(call.linear, fullgraph=True)(x, *made, None, torch.bfloat16)
    assert sqnr(x.double() @ block_scales.dequantize(*made, size[0], torch.float64).t(), got) > 44


# --- compiled ---


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled(granularity: str, dtype: torch.dtype) -> None:
    m, x = model(dtype), gaussian(1, 96, WIDTH, dtype=dtype)
    expected = run(m, x)
    m.compile_blocks(inner_backend="inductor", granularity=granularity)
    assert 26 < sqnr(expected, run(m, x)) < 60
    assert fp8_compile.report(m).totals == {**fp8_compile.report(m).totals, "quantized": 12, "unquantized": 0}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_compiled(dtype: torch.dtype, mode: str) -> None:
    m, x = model(dtype), gaussian(1, 96, WIDTH, dtype=dtype)
    expected = run(m, x)
    m.compile_whole(inner_backend="inductor", method="int8", mode=mode)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert 30 < sqnr(expected, run(m, x)) < 60
    assert {row.scheme for row in fp8_compile.report(m).layers} == {"int8-row"}


@pytest.mark.parametrize("rows", [1, 8, 96])
@pytest.mark.parametrize("rotation", int8.ROTATIONS)
def test_int8_rotated(rotation: int, rows: int) -> None:
    m, x = nn.Linear(512, 256).to(CUDA, torch.bfloat16), gaussian(rows, 512)
    x[:, ::128] *= 50
    with torch.no_grad():
        expected = m(x)
        options = {"method": "int8", "rotation": rotation}
        assert sqnr(expected, torch.compile(m, backend="fp8_diffusion", fullgraph=True, options=options)(x)) > 34


def test_int8_compiled_for_sizes_that_change() -> None:
    """One graph for those that the kernel takes, and one for those with padding."""
    m = nn.Linear(256, 256).to(CUDA, torch.bfloat16)
    options = {"method": "int8", "min_m": 1}
    compiled = torch.compile(m, backend="fp8_diffusion", fullgraph=True, dynamic=True, options=options)
    with torch.no_grad():
        for rows in (40, 5, 17, 16, 1000, 2):
            x = gaussian(rows, 256)
            by_hand = int8_linear(int8_quantize_rowwise(x), *int8_quantize_weight(m.weight), m.bias, x.dtype)
            assert sqnr(by_hand, compiled(x)) > 48
    assert len(fp8_compile.report(m).graphs) == 2


def test_int8_zeros_nan_and_large_values() -> None:
    m = nn.Linear(256, 256, bias=False).to(CUDA, torch.bfloat16)
    compiled = torch.compile(m, backend="fp8_diffusion", fullgraph=True, options={"method": "int8"})
    x = gaussian(64, 256)
    x[0] = 0
    x[1] *= 1e30
    with torch.no_grad():
        out = compiled(x)
        assert bool((out[0] == 0).all())
        assert bool(out.isfinite().all())
        x[2, 5], x[3, 5] = torch.nan, torch.inf
        out = compiled(x)
    assert bool(out[2:4].isnan().all())
    assert bool(out[4:].isfinite().all())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
@pytest.mark.parametrize("way", [Model.compile_blocks, Model.compile_whole], ids=["blocks", "whole"])
def test_modes(mode: str, way: Callable[..., Any]) -> None:
    m, x = model(), gaussian(1, 128, WIDTH)
    expected = run(m, x)
    way(m, inner_backend="inductor", mode=mode)
    for _ in range(4):  # warm-up, recording, replay
        torch.compiler.cudagraph_mark_step_begin()
        assert 26 < sqnr(expected, run(m, x)) < 60


def test_a_recorded_cuda_graph_reads_new_weights_and_copies_no_constant() -> None:
    m, x = model(), gaussian(1, 128, WIDTH)
    m.compile_whole(inner_backend="inductor", mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        run(m, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.compiler.cudagraph_mark_step_begin()
        run(m, x)
    copied = [e for e in profile.events() if "Memcpy DtoD" in e.name]
    assert len(copied) <= 2, copied  # the input, and the result

    with torch.no_grad():
        m.blocks[1].to_q.weight.mul_(-2)
        fresh = Model(3).to(CUDA, torch.bfloat16).eval()
        fresh.load_state_dict(m.state_dict())
        expected = fresh(x)
    torch.compiler.cudagraph_mark_step_begin()
    assert 26 < sqnr(expected, run(m, x)) < 60


@pytest.mark.parametrize("sizes", [(17, 33, 127), (4, 96), (1, 64)], ids=str)
def test_recompiles_with_other_sizes(sizes: tuple[int, ...]) -> None:
    m = model()
    inputs = [gaussian(1, size, WIDTH) for size in sizes]
    expected = [run(m, x) for x in inputs]
    m.compile_blocks(inner_backend="inductor")
    for x, y in zip(inputs, expected, strict=True):
        assert sqnr(y, run(m, x)) > 26


def test_a_refused_shape_is_handled() -> None:
    """A linear whose kernel fails on this device at some size runs all the same, and the report says how."""
    m = nn.Linear(9216, 3072).to(CUDA, torch.bfloat16)
    x = gaussian(127, 9216)
    with torch.no_grad():
        expected = m(x)
        got = torch.compile(m, backend="fp8_diffusion", fullgraph=True)(x)
    assert sqnr(expected, got) > 26
    (row,) = fp8_compile.report(m).layers
    refused = refusal(Fp8(), ROWWISE, CUDA, 127, (9216, 3072), torch.bfloat16, True)
    assert row.scheme == ("fp8-row" if refused is None else "fp8-row-unfused-scales")


def test_weight_only_modulation() -> None:
    m = nn.Sequential(nn.SiLU(), nn.Linear(256, 1536)).to(CUDA, torch.bfloat16)
    for rows in (1, 2):
        x = gaussian(rows, 256)
        with torch.no_grad():
            expected = m(x)
            got = torch.compile(m, backend="fp8_diffusion", dynamic=False)(x)
        assert sqnr(expected, got) > 28


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_zeros_nan_and_large_values(granularity: str) -> None:
    m = nn.Linear(256, 256, bias=False).to(CUDA, torch.bfloat16)
    options = {"granularity": granularity}
    compiled = torch.compile(m, backend="fp8_diffusion", fullgraph=True, options=options)
    x = gaussian(64, 256)
    x[0] = 0
    x[1] *= 1e30
    with torch.no_grad():
        out = compiled(x)
        assert bool((out[0] == 0).all())
        assert bool(out.isfinite().all())
        x[2, 5] = torch.nan
        out = compiled(x)
    assert bool(out[2].isnan().all())
    assert bool(out[3].isfinite().all()) == (granularity == "row")


def test_moved_to_the_cpu_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are the same, so nothing is quantized again; meanwhile only the FP8 constants are on the device."""
    quantized: list[str] = []
    store = constants._store

    def counted(state: Any, constant: Any, made: Any) -> None:
        quantized.append(constant.path)
        store(state, constant, made)

    monkeypatch.setattr(constants, "_store", counted)
    gc.collect()
    empty = torch.cuda.memory_allocated()
    m = model()
    tensors = [*m.parameters(), *m.buffers()]
    allocated = torch.cuda.memory_allocated() - empty
    x = gaussian(1, 96, WIDTH)
    m.compile_blocks(inner_backend="inductor")
    first = [run(m, x) for _ in range(2)][-1]
    assert len(quantized) == 12
    gc.collect()
    before, extra = torch.cuda.memory_allocated(), fp8_compile.report(m).extra_bytes
    m.to("cpu")
    gc.collect()
    left = before - torch.cuda.memory_allocated()
    assert left == allocated >= sum(t.nbytes for t in tensors) > extra > 0
    m.to(CUDA)
    assert torch.cuda.memory_allocated() == before
    torch.testing.assert_close(run(m, x), first, rtol=0, atol=0)
    assert len(quantized) == 12, quantized[12:]
    assert fp8_compile.report(m).extra_bytes == constants


@pytest.mark.parametrize("name", ["QwenImage", "ZImage", "Flux", "Wan", "HunyuanVideo"])
def test_real_models(name: str) -> None:
    tiny = MODELS[name]
    m = tiny.build().to(CUDA)
    inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(CUDA), tiny.inputs(0))
    with torch.no_grad():
        expected = tiny.output(m(**inputs))
        m.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True, options=OPTIONS)
        got = tiny.output(m(**inputs))
    assert fp8_compile.report(m).totals["quantized"] > 0
    assert sqnr(expected, got) > 22


def test_numerics_are_those_of_the_cpu() -> None:
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    for quantize in (numerics.quantize_rowwise, numerics.quantize_tensorwise, int8_quantize_rowwise):
        here, there = quantize(x), quantize(x.to(CUDA))
        torch.testing.assert_close(there[1].cpu(), here[1], rtol=1e-6, atol=0)
        assert float((there[0].cpu().float() == here[0].float()).float().mean()) > 0.999  # ties under another scale


@pytest.mark.parametrize("dynamic", [False, True])
def test_gelu_and_rotations_in_generated_code(dynamic: bool) -> None:
    from tests.passes.test_rotary_pairs import flux_double, wan
    from tests.support.graphs import Call as Module

    def function(m: Any, text: Tensor, image: Tensor, cos: Tensor, sin: Tensor) -> Any:
        flat = nn.functional.gelu(text, approximate="tanh")
        length = image.shape[1]
        return flux_double(m, flat, image, cos, sin), wan(m, image, cos[None, :length, None], sin[None, :length, None])

    torch._dynamo.reset()
    module = Module(function)
    compiled = torch.compile(module, backend="fp8_diffusion", fullgraph=True, dynamic=dynamic)
    for tokens in (65, 130):
        tables = (torch.randn(32 + tokens, 128, device=CUDA) for _ in range(2))
        inputs = gaussian(2, 32, 4, 128), gaussian(2, tokens, 4, 128), *tables
        with torch.no_grad():
            for got, expected in zip(compiled(*inputs), module(*inputs), strict=True):
                assert sqnr(expected, got) > 50


# --- calibration ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_magnitudes_are_counted_as_on_the_cpu_and_without_waiting(dtype: torch.dtype) -> None:
    x = gaussian(4096, 3072, dtype=dtype) ** 3
    x[0, :3] = torch.tensor([torch.inf, torch.nan, 0.0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts, amax = histogram.count(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, largest = histogram.count(x.cpu())
    assert torch.equal(counts.cpu(), expected)
    assert torch.equal(amax.cpu(), largest)


def test_a_step_is_calibrated_without_waiting() -> None:
    m, x = model(), gaussian(2, 64, WIDTH)
    with torch.no_grad(), fp8_compile.calibrate(m, progress=False) as calibration:
        torch.cuda.set_sync_debug_mode("error")
        try:
            m(x)
            m(2 * x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad(), fp8_compile.calibrate(m.cpu(), progress=False) as expected:
        m(x.cpu())
        m(2 * x.cpu())
    found, same = (c.scales(m)["blocks.0.to_q"] for c in (calibration, expected))
    assert found == pytest.approx(same, rel=0.01)  # layer norm rounds differently
