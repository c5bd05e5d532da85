"""FP8 with a scale for each block: the numerics, the operator, and models that run with them."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fp8_compile
from fp8_compile import QuantizedWeight, block_scales, numerics
from fp8_compile.schemes import scheme as scheme_module
from fp8_compile.schemes.fp8 import BLOCK_SIZES, Fp8
from tests.support.blocks import LOAD, model, tokens
from tests.support.sqnr import sqnr

ROWS = pytest.mark.parametrize("rows", [128, 1])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# Output and input features: whole blocks, and what must be padded in one direction or both.
SHAPES = pytest.mark.parametrize("shape", [(256, 512), (48, 64), (304, 256), (256, 208), (144, 1040)], ids=str)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def heavy_tailed(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(sum(shape))
    normal = [torch.randn(shape, generator=generator) for _ in range(4)]
    return (normal[0] / (sum(x.square() for x in normal[1:]) / 3).sqrt()).to(dtype)


def outlier_channels(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Two input channels a thousand times as large as the others."""
    x = gaussian(*shape, dtype=torch.float32)
    x[..., [5, 77]] *= 1000
    return x.to(dtype)


INPUTS = {"gaussian": gaussian, "heavy-tailed": heavy_tailed, "outlier channels": outlier_channels}


def compiled(function: Callable[..., Any], *args: Any, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)


def function(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return block_scales.blockwise_linear(block_scales.quantize_blockwise(x), weight, scale, bias, dtype)


# --- quantization ---


@ROWS
@DTYPES
@SHAPES
def test_scale_of_each_block(shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    weight = gaussian(*shape, dtype=dtype)
    values, scale = block_scales.quantize_weight(weight, rows)
    assert (values.dtype, values.shape, values.is_contiguous()) == (torch.float8_e4m3fn, shape, True)
    assert (scale.dtype, scale.shape) == (torch.float32, (math.ceil(shape[0] / rows), math.ceil(shape[1] / 128)))
    for i, of_row in enumerate(scale):
        for j, found in enumerate(of_row):
            block = slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128)
            alone, expected = numerics.quantize_weight_tensorwise(weight[block])
            assert found == expected
            assert torch.equal(values[block].float(), alone.float())
    assert sqnr(weight, block_scales.dequantize(values, scale, rows, torch.float32)) > 31


@DTYPES
@pytest.mark.parametrize("features", [256, 64, 208])
def test_an_activation_has_a_scale_for_each_row_and_128_columns(features: int, dtype: torch.dtype) -> None:
    x = gaussian(2, 5, features, dtype=dtype)
    values, scale = block_scales.quantize_blockwise(x)
    assert (values.dtype, values.shape, values.is_contiguous()) == (torch.float8_e4m3fn, x.shape, True)
    assert (scale.dtype, scale.shape, scale.is_contiguous()) == (torch.float32, (math.ceil(features / 128), 10), True)
    for j in range(len(scale)):
        part = slice(j * 128, (j + 1) * 128)
        alone, expected = numerics.quantize_rowwise(x[..., part])
        assert torch.equal(values[..., part].float(), alone.float())
        assert torch.equal(scale[j], expected.flatten())


@ROWS
def test_zeros_stay_zeros_and_nan_stays_in_its_rows(rows: int) -> None:
    weight, x = gaussian(256, 208), gaussian(6, 208)
    weight[:128] = 0
    weight[130, 5] = math.nan
    x[1] = 0
    x[3, 200] = math.nan
    made = block_scales.quantize_weight(weight, rows)
    assert not made[1].isfinite().all()
    out = function(x, *made, None, torch.bfloat16)
    fine = torch.tensor([0, 1, 2, 4, 5])
    assert (out[fine, :128] == 0).all()
    assert out[3].isnan().all()
    assert out[:, 130].isnan().all()
    of_its_block = slice(128, 256) if rows == 128 else slice(130, 131)
    others = torch.ones(256, dtype=torch.bool)
    others[of_its_block] = False
    assert out[fine][:, others].isfinite().all()
    assert (out[1, others] == 0).all()


@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 208)], ids=str)
def test_no_rows(shape: tuple[int, ...]) -> None:
    made = block_scales.quantize_weight(gaussian(48, shape[-1]), 128)
    out = function(torch.empty(shape, dtype=torch.bfloat16), *made, gaussian(48), torch.bfloat16)
    assert (out.dtype, out.shape) == (torch.bfloat16, (*shape[:-1], 48))


@pytest.mark.parametrize("block", BLOCK_SIZES, ids=str)
def test_chunks_are_of_whole_blocks(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheme_module, "CHUNK_ON_CPU", 300 * 208)
    scheme = Fp8(weight_block_size=block)
    for weight in (gaussian(400, 208), gaussian(208, 400).t()):
        for whole, part in zip(scheme.quantize_weight(weight), scheme.quantize_in_chunks(weight), strict=True):
            assert torch.equal(whole.float(), part.float())


# --- the linear ---


@pytest.mark.parametrize("lead", [(), (8,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@DTYPES
@ROWS
@SHAPES
def test_linear_agrees_with_float64(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, bias: bool, lead: tuple[int, ...]
) -> None:
    n, k = shape
    x = block_scales.quantize_blockwise(gaussian(*lead, k, dtype=dtype))
    weight = block_scales.quantize_weight(gaussian(n, k), rows)
    b = gaussian(n, dtype=dtype) if bias else None
    out = block_scales.blockwise_linear(x, *weight, b, dtype)
    assert (out.dtype, out.shape) == (dtype, (*lead, n))
    left = x[0].double() * x[1].double().t().reshape(*lead, -1).repeat_interleave(128, -1)[..., :k]
    scale = weight[1].double().repeat_interleave(rows, 0)[:n].repeat_interleave(128, 1)[:, :k]
    expected = F.linear(left, weight[0].double() * scale, None if b is None else b.double())
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=2**-18 * float(expected.abs().max()))
    torch.testing.assert_close(out, block_scales.reference(x, *weight, b, dtype), rtol=2 * rounding, atol=1e-3)


@ROWS
@DTYPES
@SHAPES
@pytest.mark.parametrize("rows_of_x", [1, 5, 24])
def test_few_rows_and_dequantized_weights(
    rows_of_x: int, shape: tuple[int, int], dtype: torch.dtype, rows: int
) -> None:
    n, k = shape
    x, b, made = gaussian(rows_of_x, k, dtype=dtype), gaussian(n), block_scales.quantize_weight(gaussian(n, k), rows)
    expected = F.linear(x.double(), block_scales.dequantize(*made, rows, torch.float64), b.double())
    for linear, least in ((block_scales.blockwise_weight_only_linear, 50), (block_scales.dequantized_linear, 45)):
        out = linear(x, *made, b, dtype)
        assert out.dtype == dtype
        assert sqnr(expected, out) > least
        assert torch.equal(compiled(linear, x, *made, b, dtype), out)


@ROWS
@DTYPES
@SHAPES
def test_compiled_it_is_the_same_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    n, k = shape
    args = gaussian(2, 3, k, dtype=dtype), *block_scales.quantize_weight(gaussian(n, k), rows), gaussian(n), dtype
    assert torch.equal(compiled(function, *args), function(*args))


@pytest.mark.inductor
@pytest.mark.parametrize("features", [64, 208, 256])
@ROWS
def test_generated_code_is_the_same_to_the_bit(features: int, rows: int) -> None:
    """With 208 features, Inductor forgets 80 of each row in what is written without care (PyTorch's issue 195582)."""

    def everything(x: Tensor, few: Tensor, *made: Tensor) -> list[Tensor]:
        linears = block_scales.blockwise_weight_only_linear, block_scales.dequantized_linear
        return [function(x, *made, None, x.dtype), *(linear(few, *made, None, x.dtype) for linear in linears)]

    made = block_scales.quantize_weight(gaussian(304, features), rows)
    args = gaussian(33, features), gaussian(3, features), *made
    with torch._inductor.config.patch(force_disable_caches=True):
        generated = compiled(everything, *args, backend="inductor")
    for got, expected in zip(generated, everything(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.inductor
def test_max_autotune_calls_the_operator_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one FP8 activation for three matmuls, as `one_fp8_copy` sees to."""
    qkv = nn.ModuleList(nn.Linear(256, 256) for _ in range(3)).bfloat16()

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = qkv

        def forward(self, x: Tensor) -> list[Tensor]:
            normed = F.layer_norm(x, (256,))
            return [linear(normed) for linear in self.qkv]

    m, x = Normed(), gaussian(2, 16, 256)
    monkeypatch.setattr(numerics, "has_kernel", lambda device_type: True)
    options = {"weight_block_size": [128, 128], "mode": "max-autotune-no-cudagraphs"}
    expected = m(x)
    with torch._inductor.config.patch(force_disable_caches=True):
        got, (code,) = run_and_get_code(compile_with(m, options), x)
    assert all(26 < sqnr(a, b) < 40 for a, b in zip(expected, got, strict=True))
    assert code.count("torch.ops.fp8_compile.block_scaled_mm.default(") == 3
    assert "scaled_mm_v2" not in code
    body = code[code.index("def call(") : code.index("return (", code.index("def call("))]
    assert body.count("torch.float8_e4m3fn)") == 1
    assert body.count("empty_strided_cpu((2, 32), (32, 1), torch.float32)") == 1  # the activation's scales
    (copies,) = {result.matches for r in fp8_compile.report(m).passes.values() for result in r if "copy" in result.name}
    assert copies == 3


def compile_with(m: nn.Module, options: dict[str, Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(m, backend="fp8_diffusion", fullgraph=True, options=options)


# --- quality: floors, and what finer scales are good for ---


def loss(make: Callable[..., Tensor], rows: int | None, dtype: torch.dtype) -> float:
    x, weight = make(64, 512, dtype=dtype), gaussian(256, 512, dtype=dtype)
    if rows is None:
        out = numerics.scaled_linear(numerics.quantize_rowwise(x), *numerics.quantize_rowwise(weight), None, dtype)
    else:
        out = function(x, *block_scales.quantize_weight(weight, rows), None, dtype)
    return sqnr(F.linear(x.double(), weight.double()), out)


@DTYPES
@ROWS
@pytest.mark.parametrize(("name", "floor"), [("gaussian", 28), ("heavy-tailed", 27.5), ("outlier channels", 28)])
def test_quality(name: str, floor: float, rows: int, dtype: torch.dtype) -> None:
    assert loss(INPUTS[name], rows, dtype) > floor


def test_outliers_take_only_their_own_block() -> None:
    """A huge channel leaves nothing of the others under one scale per row; under blocks, of 127 others."""
    x, weight = gaussian(64, 512), gaussian(256, 512)
    x[:, 5] = 1e6
    weight[:, 5] = 0  # so that only what it does to the others counts
    expected = F.linear(x.double(), weight.double())
    by_row = numerics.scaled_linear(
        numerics.quantize_rowwise(x), *numerics.quantize_rowwise(weight), None, torch.bfloat16
    )
    assert sqnr(expected, by_row) < 1
    for rows in (128, 1):
        assert 5 < sqnr(expected, function(x, *block_scales.quantize_weight(weight, rows), None, torch.bfloat16)) < 7


# --- the operator ---


@ROWS
@pytest.mark.parametrize(("m", "n", "k"), [(8, 256, 512), (7, 144, 640), (1, 64, 64), (130, 48, 208)])
def test_what_cublaslt_gets(m: int, n: int, k: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The strides that torch's source demands of each operand, and the result that the CPU gives."""
    asked = []

    def scaled_mm(a: Tensor, b: Tensor, sa: Tensor, kind_a: Any, sb: Tensor, kind_b: Any, **options: Any) -> Tensor:
        kinds = torch.nn.functional.ScalingType
        (padded, _), groups = a.shape, math.ceil(k / 128)
        assert padded % 4 == 0
        assert (a.stride(), b.stride()) == ((k, 1), (1, k))
        assert kind_a == kinds.BlockWise1x128
        assert kind_b == (kinds.BlockWise1x128 if rows == 1 else kinds.BlockWise128x128)
        longest = groups if rows == 1 else 4 * math.ceil(groups / 4)
        assert sa.shape == (padded, groups)
        assert sb.shape == ((n, groups) if rows == 1 else (longest, math.ceil(n / 128)))
        for scale, stride in ((sa, padded), (sb, n if rows == 1 else longest)):
            assert scale.stride(0) == 1
            assert scale.stride(1) == stride or (scale.shape[1] == 1 and scale.stride(1) == 1)
        assert options == {"output_dtype": torch.bfloat16, "use_fast_accum": False}
        asked.append(padded)
        of_weight = sb if rows == 1 else sb.t()[:, :groups]
        left = block_scales.dequantize(a, sa, 1, torch.float32)
        return (left @ block_scales.dequantize(b.t(), of_weight, rows, torch.float32).t()).bfloat16()

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    operands: list[tuple[Any, ...]] = []

    def kept(*args: Any) -> Tensor:
        operands.append(args)
        return torch.zeros(m, n)

    monkeypatch.setattr(block_scales, "MATMUL", kept)
    monkeypatch.setattr(numerics, "has_kernel", lambda device_type: True)
    function(gaussian(m, k), *block_scales.quantize_weight(gaussian(n, k), rows), None, torch.bfloat16)
    ((*tensors, of_rows, _),) = operands
    out = block_scales._on_cuda(*tensors, of_rows, torch.bfloat16)
    assert asked == [math.ceil(m / 4) * 4]
    assert torch.equal(out, block_scales._on_cpu(*tensors, of_rows, torch.bfloat16))


@ROWS
def test_the_operator_is_what_compilers_are_told(rows: int) -> None:
    x, weight = (
        block_scales.quantize_blockwise(gaussian(8, 256)),
        block_scales.quantize_weight(gaussian(256, 256), rows),
    )
    scale = weight[1].t().contiguous() if rows == 1 else F.pad(weight[1], (0, 2))
    args = *x, weight[0], scale, rows, torch.float32
    torch.library.opcheck(block_scales.MATMUL, args, test_utils="test_faketensor")


def test_under_autocast_it_is_the_same() -> None:
    made = block_scales.quantize_weight(gaussian(48, 208), 128)
    x = gaussian(24, 208)
    for linear in (function, block_scales.blockwise_weight_only_linear):
        expected = linear(x, *made, None, torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear(x, *made, None, torch.bfloat16), expected)
            assert torch.equal(compiled(linear, x, *made, None, torch.bfloat16), expected)


# --- models ---

EACH = pytest.mark.parametrize("block", BLOCK_SIZES, ids=str)


def runs(m: nn.Module, x: Tensor, **options: Any) -> Tensor:
    torch.compiler.reset()
    m._compiled_call_impl = None
    m.compile(backend="fp8_diffusion", fullgraph=True, options={"inner_backend": "aot_eager", **options})
    return m(x)  # type: ignore[no-any-return]


@EACH
def test_all_ways_to_a_model_agree_to_the_bit(block: tuple[int, int], tmp_path: Path) -> None:
    m, x = model(2), tokens()
    plain = m(x)
    online = runs(copy.deepcopy(m), x, **LOAD, weight_block_size=list(block))
    assert 30 < sqnr(plain, online) < 60
    fp8_compile.quantize_(m, {**LOAD, "weight_block_size": list(block)})
    assert {p.scheme for p in m.parameters() if isinstance(p, QuantizedWeight)} == {Fp8(weight_block_size=block)}
    fp8_compile.save_fp8_checkpoint(m, tmp_path / "m.safetensors")
    fp8_compile.load_fp8_checkpoint(read := model(2), tmp_path / "m.safetensors")
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    (other := model(2)).load_state_dict(torch.load(file, weights_only=True), assign=True)
    for made in (m, copy.deepcopy(m), pickle.loads(pickle.dumps(m)), read, other):
        assert torch.equal(runs(made, x), online)
        layers = [row for row in fp8_compile.report(made).layers if row.decision == "quantized"]
        assert {row.scheme for row in layers} == {f"fp8-{block[0]}x{block[1]}"}
        assert len(layers) == 8


@EACH
def test_few_rows_are_multiplied_by_the_dequantized_weight(block: tuple[int, int]) -> None:
    m, x = model(2), tokens(3)
    plain = m(x)
    fp8_compile.quantize_(m, {**LOAD, "weight_block_size": list(block)})
    assert sqnr(m(x), runs(m, x)) > 35  # eager mode reads the same values, rounded to bfloat16
    assert sqnr(plain, m(x)) > 26
    assert {row.scheme for row in fp8_compile.report(m).layers} == {"fp8-weight-only"}


@pytest.mark.inductor
def test_a_model_in_generated_code() -> None:
    m, x = model(2), tokens()
    by_hand = runs(copy.deepcopy(m), x, **LOAD, weight_block_size=[128, 128])
    out = runs(m, x, **LOAD, weight_block_size=[128, 128], inner_backend="inductor")
    assert sqnr(by_hand, out) > 40


def test_a_changed_weight_and_another_size_of_picture() -> None:
    m = model(2)
    fp8_compile.quantize_(m, {**LOAD, "weight_block_size": [128, 128]})
    before = runs(m, tokens())
    m.blocks[0].to_q.weight.mul_(-2)
    assert not torch.equal(m(tokens()), before)
    for count in (9, 33, 64):
        assert m(tokens(count)).shape == (1, count, 64)


@EACH
def test_through_diffusers(block: tuple[int, int], tmp_path: Path) -> None:
    import diffusers

    from bench.tiny import build_transformer

    kind: Any = diffusers.QwenImageTransformer2DModel
    m = build_transformer().bfloat16()
    m.save_pretrained(tmp_path / "bf16")
    config = fp8_compile.Fp8DiffusionConfig(weight_block_size=list(block))
    loaded = kind.from_pretrained(tmp_path / "bf16", torch_dtype=torch.bfloat16, quantization_config=config)
    loaded.save_pretrained(tmp_path / "fp8")
    again = kind.from_pretrained(tmp_path / "fp8", torch_dtype=torch.bfloat16)
    fp8_compile.quantize_(m, {"weight_block_size": list(block)})
    expected = dict(m.named_parameters())
    for made in (loaded, again):
        found = {name: p for name, p in made.named_parameters() if isinstance(p, QuantizedWeight)}
        assert len(found) > 10
        for name, parameter in found.items():
            assert parameter.scheme == Fp8(weight_block_size=block)
            for a, b in zip(parameter.constants, expected[name].constants, strict=True):
                assert torch.equal(a.float(), b.float())


def test_where_a_device_has_no_kernel_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8_compile import backend

    def refusal(scheme: Any, call: Any, *what: Any) -> str | None:
        return None if call.reference is None else "cuda:0 refuses 32 x 64 by 64 x 64: only on SM90"

    rewrite, m, x = backend.rewrite, model(2), tokens()

    def asked(context: Any, trace: Any) -> Any:
        context.refusal = refusal
        return rewrite(context, trace)

    monkeypatch.setattr(backend, "rewrite", asked)
    expected = m(x)
    assert sqnr(expected, runs(m, x, **LOAD, weight_block_size=[128, 128])) > 30
    rows = fp8_compile.report(m).layers
    assert {(row.decision, row.scheme) for row in rows} == {("quantized", "fp8-weight-only")}
    assert {row.reason for row in rows} == {"cuda:0 refuses 32 x 64 by 64 x 64: only on SM90"}
