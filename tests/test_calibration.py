"""Ranges of activations: what is seen, what it is made into, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8_compile
from fp8_compile import Calibration, CalibrationError, UncalibratedLayersWarning, calibrate, load_calibration
from fp8_compile.calibration import histogram
from fp8_compile.calibration.clipping import clipping, fit
from fp8_compile.calibration.histogram import BINS, FINITE_BINS, bin_edges, bin_of, count
from fp8_compile.calibration.records import LayerRecord, generations_of
from fp8_compile.errors import OptionError, PatternError
from fp8_compile.numerics import FP8_MAX
from tests.support import lora
from tests.support.blocks import Model, model, tokens
from tests.support.zoo import MODELS

TINY = MODELS["QwenImage"]
K = 64


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def layer_of(calibration: Calibration, path: str, name: str = "model") -> LayerRecord:
    return calibration.models[name].layers[path]


def counted(x: Tensor) -> Tensor:
    return count(x)[0][:FINITE_BINS]


def run(m: nn.Module) -> Tensor:
    return TINY.output(m(**TINY.inputs(0)))


# --- counting ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_value_is_in_its_bin(dtype: torch.dtype) -> None:
    x = (torch.randn(5000, dtype=torch.float64) * 2.0 ** torch.randint(-14, 14, (5000,))).to(dtype)
    counts, amax = count(x)
    edges, expected = bin_edges(), torch.zeros(BINS, dtype=torch.int64)
    for value in x.float().abs().double():
        expected[int(torch.searchsorted(edges, value, right=True)) - 1] += 1
    assert torch.equal(counts, expected)
    assert amax.view(torch.float32) == x.abs().max().float()


def test_zeros_infinities_and_nan_have_places() -> None:
    x = torch.tensor([0.0, -0.0, 1.5, -3.0, torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max, 1e-45])
    for dtype in (torch.float32, torch.bfloat16):
        counts, amax = count(x.to(dtype))
        infinite = int(x.to(dtype).isfinite().logical_not().sum())
        assert counts[FINITE_BINS:].sum() == infinite
        assert counts.sum() == len(x)
        assert amax.view(torch.float32) == x.to(dtype)[x.to(dtype).isfinite()].abs().max().float()
    counts, amax = count(torch.full((3,), torch.nan))
    assert (int(counts.sum()), float(amax.view(torch.float32))) == (3, 0.0)


def test_chunks_layouts_and_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 11, 13)
    whole = count(x)
    monkeypatch.setattr(histogram, "_CHUNK", 100)
    for same in (x, x.transpose(0, 2), x.flip(0)):
        assert all(map(torch.equal, count(same), whole))
    assert count(x[:, :0])[0].sum() == 0


def test_bins_are_as_wide_as_stated() -> None:
    edges = bin_edges()[32:]  # below are the numbers that are not normal
    relative = (edges[1:] - edges[:-1]) / edges[:-1]
    assert relative.max() == 1 / 32
    assert relative.min() == 1 / 63
    assert torch.equal(bin_of(torch.tensor([1.0, 1.99, 2.0])) - bin_of(torch.tensor(1.0)), torch.tensor([0, 31, 32]))


# --- clipping ---


def _samples(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)
    if kind == "outliers":
        x[:20] *= 300
    elif kind == "heavy":
        x = x.sign() * x.abs() ** 3
    elif kind == "zeros":
        x[::2] = 0
    elif kind == "tiny":
        x *= 1e-12
    return x


KINDS = ("normal", "outliers", "heavy", "zeros", "tiny")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [99.99, 99.0, 60.0, 100])
def test_percentile_against_the_values(kind: str, percentile: float) -> None:
    x = _samples(kind).abs()
    found = float(clipping(counted(x)[None], x.max()[None].double(), "percentile", percentile))
    exact = float(x.sort().values[math.ceil(len(x) * percentile / 100) - 1])
    assert found == pytest.approx(exact, rel=1 / 32)


def squared_error(x: Tensor, clip: float) -> float:
    scale = clip / FP8_MAX
    codes = (x.double() / scale).clamp(-FP8_MAX, FP8_MAX).float().to(torch.float8_e4m3fn)
    return float((codes.double() * scale - x.double()).square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_squared_error_against_all_clipping_values(kind: str) -> None:
    x = _samples(kind)
    amax = float(x.abs().max())
    found = float(clipping(counted(x)[None], torch.tensor([amax], dtype=torch.float64), "mse"))
    best = min(squared_error(x, amax * 2 ** (-i / 64)) for i in range(8 * 64))
    assert found <= amax
    # Its clipping value is the edge of a bin, and the brute force tries four as many: what differs is a few percent.
    assert squared_error(x, found) <= 1.05 * best
    assert best <= squared_error(x, amax)


def test_layers_are_clipped_alone_as_together() -> None:
    xs = [_samples(kind) for kind in KINDS]
    counts = torch.stack(list(map(counted, xs)))
    amax = torch.tensor([float(x.abs().max()) for x in xs], dtype=torch.float64)
    for algorithm in ("amax", "percentile", "mse"):
        together = clipping(counts, amax, algorithm)
        alone = [clipping(counts[i : i + 1], amax[i : i + 1], algorithm) for i in range(len(xs))]
        assert torch.allclose(together, torch.cat(alone), rtol=1e-12)


def test_how_values_fare_against_the_values() -> None:
    x = _samples("heavy")
    amax = float(x.abs().max())
    for clip in (amax, amax / 50):
        found, scale, others = fit(counted(x), amax, clip), clip / FP8_MAX, x[x != 0].abs()
        sqnr = 10 * math.log10(float(x.double().square().sum()) / squared_error(x, clip))
        assert found.sqnr == pytest.approx(sqnr, abs=0.2)
        assert found.subnormal == pytest.approx(float((others < 2**-6 * scale).float().mean()), abs=0.003)
        assert found.flushed == pytest.approx(float((others <= 2**-10 * scale).float().mean()), abs=0.003)
        assert found.clipped == pytest.approx(float((x.abs() > clip).float().mean()), abs=0.001)


# --- what is seen ---


class Written(nn.Module):
    """A linear, in one of the ways to write it, on parameters of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.proj = nn.Linear(K, K, dtype=torch.bfloat16)
        self.table = nn.Parameter(torch.randn(K, K, dtype=torch.bfloat16))
        self.patches = nn.Conv2d(K, K, 1, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        w, bias, inputs = self.proj.weight, self.proj.bias, x.reshape(-1, K)
        ways: dict[str, Callable[[], Any]] = {
            "module": lambda: self.proj(x),
            "linear": lambda: nn.functional.linear(x, w),
            "keywords": lambda: nn.functional.linear(input=x, weight=w, bias=bias),
            "at T": lambda: x @ w.T,
            "at mT": lambda: x @ w.mT,
            "at a parameter": lambda: x @ w,
            "matmul": lambda: torch.matmul(x, w.t()),
            "method": lambda: x.matmul(w.transpose(0, 1)),
            "mm": lambda: torch.mm(inputs, w.permute(1, 0)),
            "mm of keywords": lambda: inputs.mm(mat2=w.t()),
            "addmm": lambda: torch.addmm(bias, inputs, w.t()),
            "addmm method": lambda: bias.addmm(inputs, w.detach().T),
            "contiguous": lambda: inputs @ w.t().contiguous(),
            "twice transposed": lambda: nn.functional.linear(x, w.T.T),
            "cast": lambda: nn.functional.linear(x.float(), w.float()),
            "data": lambda: nn.functional.linear(x, w.data),
            "wrapped": lambda: nn.functional.linear(x, nn.Parameter(w)),
            "a view": lambda: nn.functional.linear(x, w.view(-1).view(K, K)),
            "a view of a view": lambda: nn.functional.linear(x, w.view(-1).view(K, K).T.mT),
            "aten": lambda: torch.ops.aten.linear.default(x, w, bias),
            "aten mm": lambda: torch.ops.aten.mm.default(inputs, torch.ops.aten.t.default(w)),
        }
        ways[self.way]()
        # These are no linears: a product of activations, a row of a matrix, a weight that is computed, a part of one,
        # that of a convolution.
        _ = inputs @ inputs.T
        _ = nn.functional.embedding(torch.zeros(1, dtype=torch.long), self.table)
        _ = inputs @ (self.table * 2)
        _ = nn.functional.linear(inputs, self.table[:4])
        _ = nn.functional.linear(inputs, self.patches.weight.view(K, K))
        return x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.proj(x) * 100)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(K, 2)
        self.proj = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attn(x, x, x)[0])


WAYS = [
    *("module", "linear", "keywords", "at T", "at mT", "at a parameter", "matmul", "method", "mm", "mm of keywords"),
    *("addmm", "addmm method", "contiguous", "twice transposed", "cast", "data", "wrapped", "a view"),
    *("a view of a view", "aten", "aten mm"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_each_way_to_write_a_linear(way: str, mode: Callable[[], Any]) -> None:
    m, x = Written(way), torch.randn(2, 5, K, dtype=torch.bfloat16)
    with mode(), calibrate(m, progress=False) as calibration:
        m(x)
        m(2 * x)
    (layer,) = calibration.models["model"].layers.values()
    assert layer.paths == ("proj",)
    assert torch.equal(layer.counts, counted(torch.cat([x, 2 * x])))
    assert (layer.values, layer.calls, layer.rows) == (20 * K, 2, (10, 10))
    amax = float(x.abs().max())
    assert (layer.amax, layer.ranges) == (2 * amax, (amax, 2 * amax))
    assert calibration.scales(m) == {"proj": float(torch.tensor(2 * amax) / 448)}


@pytest.mark.parametrize("way", ["module", "at T", "mm", "addmm", "cast", "aten"])
def test_a_quantized_weight_is_a_weight(way: str) -> None:
    m, x = Written(way), torch.randn(2, 5, K, dtype=torch.bfloat16)
    fp8_compile.quantize_(m, {"min_features": K})
    with calibrate(m, progress=False) as calibration:
        m(x)
    assert torch.equal(layer_of(calibration, "proj").counts, counted(x))


def test_values_by_hand() -> None:
    m = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    m[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, -4.0]]))
    with calibrate(m, progress=False) as calibration:
        m(torch.tensor([[1.0, 2.0]]))
        m(torch.tensor([[0.5, 0.0], [3.0, 1.0]]))
    record = calibration.models["model"]
    assert record.layers["0"].ranges == (2.0, 3.0)
    assert record.layers["1"].ranges == (8.0, 6.0)
    edges = bin_edges()
    seen = {float(edges[i]): int(record.layers["1"].counts[i]) for i in record.layers["1"].counts.nonzero()}
    assert seen == {0.0: 1, 1.0: 1, 2.0: 1, 4.0: 1, 6.0: 1, 8.0: 1}
    assert record.layers["1"].rows == (1, 2)
    assert [(dict(i.shapes), i.calls) for i in record.inputs] == [({"input": ((1, 2),)}, 1), ({"input": ((2, 2),)}, 1)]
    assert calibration.scales(m) == {"0": float(torch.tensor(3 / 448)), "1": float(torch.tensor(8 / 448))}


def test_autocast_and_a_layer_that_is_called_twice_in_a_step() -> None:
    m, x = Twice(), torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16), calibrate(m, progress=False) as calibration:
        m(x)
        second = m.proj(x) * 100
    layer = layer_of(calibration, "proj")
    assert (layer.calls, layer.values) == (2 + 1, 9 * K)
    assert layer.ranges == (float(second.abs().max()),)  # the larger one of both calls; outside of a step there is none
    assert torch.equal(layer.counts, counted(x) * 2 + counted(second))


def test_tied_weights_share_a_scale() -> None:
    m = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    m[1].weight = m[0].weight
    with calibrate(m, progress=False) as calibration:
        m(torch.ones(1, K))
    assert layer_of(calibration, "0").paths == ("0", "1")
    scales = calibration.scales(m)
    assert scales["0"] == scales["1"] > 0


def test_a_layer_that_is_in_two_places_is_recorded_once() -> None:
    shared = nn.Linear(K, K)
    m = nn.Sequential(shared, nn.GELU(), shared)
    with calibrate(m, progress=False) as calibration:
        m(torch.ones(1, K))
    assert layer_of(calibration, "0").calls == 2
    assert calibration.scales(m).keys() == {"0", "2"}


def test_what_runs_beside_the_model_is_not_recorded() -> None:
    m, other = model(1), model(1)
    with calibrate(m, progress=False) as calibration:
        other(tokens())
        m(tokens())
        other.blocks[0].to_q(tokens())
    assert {layer.calls for layer in calibration.models["model"].layers.values()} == {1}
    assert len(calibration.models["model"].layers) == 4


# --- compiled ---


def as_whole(m: Model, backend: str) -> Any:
    return torch.compile(m, backend=backend)


def in_place(m: Model, backend: str) -> Any:
    m.compile(backend=backend)
    return m


def block_by_block(m: Model, backend: str) -> Any:
    for block in m.blocks:
        block.compile(backend=backend)
    return m


def same(a: Calibration, b: Calibration) -> bool:
    (one,), (other,) = a.models.values(), b.models.values()
    return (
        one.layers.keys() == other.layers.keys()
        and one.digest == other.digest
        and one.steps == other.steps
        and one.inputs == other.inputs
        and all(_same_layer(layer, other.layers[path]) for path, layer in one.layers.items())
    )


def _same_layer(a: LayerRecord, b: LayerRecord) -> bool:
    names = ("paths", "amax", "values", "nonfinite", "calls", "rows", "ranges")
    return torch.equal(a.counts, b.counts) and all(getattr(a, name) == getattr(b, name) for name in names)


def recorded(m: Any, x: Tensor) -> Calibration:
    with calibrate(m, progress=False) as calibration:
        m(x)
    return calibration


@pytest.mark.parametrize("compile_it", [as_whole, in_place, block_by_block])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("before", [False, True])
def test_compiled_code_is_seen_and_used_again(compile_it: Any, backend: str, before: bool) -> None:
    m, x = model(), tokens()
    expected = recorded(m, x)
    compiled = compile_it(copy.deepcopy(m), backend)
    if before:
        compiled(x)
    assert same(recorded(compiled, x), expected)
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):  # what was compiled has remained, and is used
        compiled(x)


def test_our_backend_is_seen_with_quantized_weights() -> None:
    m, x = model(), tokens()
    fp8_compile.quantize_(m, {"min_features": K})
    expected = recorded(m, x)
    m.compile_blocks()
    m(x)
    assert same(recorded(m, x), expected)


def test_everything_is_as_before_also_after_an_error() -> None:
    m, x = model(), tokens()
    calls: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: (calls.append(1), graph(*args))[1]

    compiled = torch.compile(m, backend=backend)
    calibration: Calibration | None = None
    try:
        with calibrate(compiled) as calibration:
            compiled(x)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert calibration is not None
    assert len(calibration.models["model"].layers) == 12  # what was seen is kept
    assert not calls
    compiled(x)
    assert calls == [1]
    assert not m._forward_pre_hooks
    assert not m._forward_hooks
    assert torch.overrides._get_current_function_mode() is None


def test_an_error_within_a_step_ends_it() -> None:
    m = model()
    with calibrate(m, progress=False) as calibration:
        with pytest.raises(RuntimeError):
            m(torch.ones(1, 3, K + 1, dtype=torch.bfloat16))
        m(tokens())
        m(tokens())
    record = calibration.models["model"]
    assert [layer.ranges.count(None) for layer in record.layers.values()] == [1] * 12
    assert len(record.steps) == 3


def test_an_interrupt_within_a_step_ends_it(tmp_path: Path) -> None:
    m = model(2)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = m.blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), calibrate(m, progress=False) as calibration:
        m(tokens())
    hook.remove()
    assert [len(layer.ranges) for layer in calibration.models["model"].layers.values()] == [1] * 8
    calibration.save(tmp_path / "scales.json")
    assert same(load_calibration(tmp_path / "scales.json"), calibration)


def test_another_thread_is_refused() -> None:
    m, errors = model(1), []

    def call() -> None:
        try:
            m(tokens())
        except CalibrationError as error:
            errors.append(error)

    with calibrate(m, progress=False) as calibration:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        m(tokens())
    assert "from another thread" in str(errors[0])
    assert len(calibration.models["model"].steps) == 1


def test_what_torch_hides_is_said() -> None:
    m, x = Hidden().eval(), torch.randn(3, 1, K)
    message = r"1 of the 2 linears of 'model' \(Hidden\) never ran, and have no static scale: attn\.out_proj"
    with pytest.warns(UncalibratedLayersWarning, match=message), calibrate(m, progress=False):
        m(x)
    traced = torch.jit.trace(m, x)
    with pytest.raises(CalibrationError, match="no linear of "), calibrate(traced, progress=False):
        traced(x)


def test_an_exported_module() -> None:
    m, x = model(), tokens()
    exported = torch.export.export(m, (x,)).module()
    found, expected = recorded(exported, x).models["model"], recorded(m, x).models["model"]
    assert found.layers.keys() == expected.layers.keys()
    assert all(_same_layer(layer, expected.layers[path]) for path, layer in found.layers.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_cache_leaves_out_steps() -> None:
    from diffusers.hooks import FirstBlockCacheConfig

    m: Any = TINY.build()
    expected = recorded_run(m).models["model"]
    m.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with m.cache_context("cond"), calibrate(m, progress=False) as calibration:
        run(m)
        run(m)
    found = calibration.models["model"].layers
    assert found.keys() == expected.layers.keys()
    assert found["transformer_blocks.0.attn.to_q"].calls == 2
    assert found["transformer_blocks.1.attn.to_q"].ranges == (
        expected.layers["transformer_blocks.1.attn.to_q"].amax,
        None,
    )


# --- what is around a model ---


def test_lora_records_the_layer_below() -> None:
    plain = lora.TINY.build()
    expected = recorded_run(plain)
    m = lora.build("a")
    # The inputs of the layers behind an adapter differ; their paths and the first one's input do not.
    found = recorded_run(m)
    record = found.models["model"]
    assert record.digest == expected.models["model"].digest
    assert record.layers.keys() == expected.models["model"].layers.keys()
    assert not any("lora" in path or "base_layer" in path for path in record.layers)
    assert found.scales(plain).keys() == expected.scales(m).keys()


def recorded_run(m: nn.Module, **options: Any) -> Calibration:
    with calibrate(m, progress=False, **options) as calibration:
        run(m)
    return calibration


def test_an_adapter_that_is_added_within_the_block() -> None:
    m = lora.TINY.build()
    with calibrate(m, progress=False) as calibration:
        run(m)
        lora.add(m, "a")
        run(m)
    assert {layer.calls for layer in calibration.models["model"].layers.values()} == {2}


def sequentially(m: Any) -> None:
    import accelerate

    accelerate.cpu_offload(m, execution_device=torch.device("cpu"), offload_buffers=True)


def as_a_whole(m: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(m, execution_device=torch.device("cpu"))


def by_leaves(m: Any) -> None:
    cpu = torch.device("cpu")
    m.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def by_blocks(m: Any) -> None:
    cpu = torch.device("cpu")
    m.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [sequentially, as_a_whole, by_leaves, by_blocks])
@pytest.mark.parametrize("quantized", [False, True])
def test_offloading(offload: Callable[[Any], None], quantized: bool) -> None:
    m: Any = TINY.build()
    if quantized:
        fp8_compile.quantize_(m, {"min_features": 64})
    expected = recorded_run(m)
    assert len(expected.models["model"].layers) == len(expected.models["model"].linears)
    offload(m)
    assert same(recorded_run(m), expected)
    assert expected.scales(m) == recorded_run(m).scales(m)


def test_parameters_that_are_replaced_during_the_call() -> None:
    m = TINY.build()
    expected = recorded_run(m)
    kept = []

    def replace(module: nn.Module, _: Any) -> None:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                kept.append(parameter)
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)

    for module in m.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(replace)
    assert same(recorded_run(m), expected)


# --- several models ---


def test_two_denoisers_that_are_equal() -> None:
    high, low = model(1), model(1)
    with calibrate(high=high, low=low, progress=False) as calibration:
        high(tokens())
        low(100 * tokens())
        low(100 * tokens())
    assert [len(record.steps) for record in calibration.models.values()] == [1, 2]
    assert calibration.models["high"].digest == calibration.models["low"].digest
    assert calibration.record(high).name == "high"  # this process knows
    assert calibration.record(low).name == "low"
    assert calibration.record(low, "high").name == "high"
    with pytest.raises(
        CalibrationError, match="fits several that were calibrated; say which: name='high' or name='low'"
    ):
        calibration.scales(model(1))
    with pytest.raises(CalibrationError, match="no model was calibrated as 'lower'; there are high, low"):
        calibration.scales(low, name="lower")


def test_two_denoisers_after_loading(tmp_path: Path) -> None:
    high, low = model(1), model(2)
    with calibrate(high, low, progress=False) as calibration:
        high(tokens())
        low(tokens())
    calibration.save(tmp_path / "scales.json")
    loaded = load_calibration(tmp_path / "scales.json")
    assert loaded.scales(low) == calibration.scales(low)
    assert loaded.record(high).name == "model"
    assert loaded.record(low).name == "model_2"


def test_what_two_models_share_belongs_to_the_one_that_runs() -> None:
    high, low = model(1), model(1)
    low.blocks[0].to_q = high.blocks[0].to_q
    with calibrate(high=high, low=low, progress=False) as calibration:
        high(tokens())
        high(tokens())
        low(tokens())
    assert [layer_of(calibration, "blocks.0.to_q", name).calls for name in ("high", "low")] == [2, 1]


def test_wrong_arguments_are_refused() -> None:
    m = model(1)
    for given, message in (
        ((), "expected a model"),
        ((m, m), "a model is given twice"),
        ((torch.compile(m, backend="eager"), m), "a model is given twice"),
    ):
        with pytest.raises(CalibrationError, match=message), calibrate(*given):
            pass
    with pytest.raises(CalibrationError, match="two models are called 'model_2'"), calibrate(m, model(1), model_2=m):
        pass
    with pytest.raises(TypeError, match=r"low: expected a torch\.nn\.Module, such as pipe\.transformer, got str"):  # noqa: SIM117
        with calibrate(low="transformer"):  # type: ignore[arg-type]
            pass


# --- steps ---


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ([3, 2, 1, 3, 2, 1], [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        ([0, 0.5, 0, 0.5], [(0, 0), (0, 1), (1, 0), (1, 1)]),  # Z-Image counts up
        ([3, 3, 1, 1, 3, 3], [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]),  # guidance in calls of its own
        ([None, None], [(0, 0), (0, 1)]),
        ([5], [(0, 0)]),
        ([], []),
    ],
)
def test_generations(timesteps: list[float | None], expected: list[tuple[int, int]]) -> None:
    assert [(step.generation, step.index) for step in generations_of(timesteps)] == expected


@pytest.mark.pipeline
@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_generations_of_a_pipeline(name: str, tmp_path: Path) -> None:
    from fp8_compile.pipelines.session import Session

    session = Session.load(f"embedded:{name}", device="cpu")
    session.pipe.set_progress_bar_config(disable=True)
    m = session.pipe.transformer
    session.pipe.transformer = torch.compile(m, backend="eager")
    with calibrate(session.pipe.transformer, progress=False) as calibration:
        for seed, prompt in enumerate(("a red circle", "a large blue square above a green circle")):
            session.call(seed, **session.arguments(prompt=prompt, num_inference_steps=4))
    record = calibration.models["model"]
    assert record.class_name == type(m).__name__
    assert [(step.generation, step.index) for step in record.steps] == [(g, i) for g in (0, 1) for i in range(4)]
    assert not record.problems
    assert all(None not in layer.ranges for layer in record.layers.values())
    assert sum(inputs.calls for inputs in record.inputs) == 8
    assert record.layers.keys() == {n for n, part in m.named_modules() if isinstance(part, nn.Linear)}
    for suffix in ("json", "safetensors"):
        calibration.save(tmp_path / f"scales.{suffix}")
        loaded = load_calibration(tmp_path / f"scales.{suffix}")
        assert same(loaded, calibration)
        for algorithm in ("amax", "percentile", "mse"):
            assert loaded.scales(m, algorithm) == calibration.scales(m, algorithm)


# --- what is refused ---


def test_layers_that_are_made_within_the_block() -> None:
    m = model(1)
    message = r"the layers of 'model' changed .*this model has no blocks\.0\.to_k"

    def change(module: Any, *_: Any) -> None:
        module.to_qk = nn.Linear(K, 2 * K)
        del module.to_k

    m.blocks[0].register_forward_hook(change)
    with pytest.raises(CalibrationError, match=message), calibrate(m, progress=False) as calibration:
        m(tokens())
    assert not calibration.models


def test_layers_that_never_ran_are_named() -> None:
    m = model(2)
    message = r"4 of the 8 linears of 'model' \(Model\) never ran, .*blocks\.1"
    with pytest.warns(UncalibratedLayersWarning, match=message), calibrate(m, progress=False) as calibration:
        m.blocks[0](tokens())
    assert calibration.scales(m).keys() == {f"blocks.0.{name}" for name in ("to_q", "to_k", "img_mlp.0", "img_mlp.2")}
    assert calibration.problems(m).keys() == {f"blocks.1.{name}" for name in ("to_q", "to_k", "img_mlp.0", "img_mlp.2")}
    with pytest.raises(CalibrationError, match="no linear of Model ran in this block"), calibrate(m, progress=False):
        pass


def test_nan_and_zeros_are_no_scales() -> None:
    m, x = model(2), tokens()
    with calibrate(m, progress=False) as calibration:
        m(x)
        m.blocks[0].to_q(torch.full((1, K), torch.nan, dtype=torch.bfloat16))
        m.blocks[0].to_k(torch.full((1, K), -torch.inf, dtype=torch.bfloat16))
    assert layer_of(calibration, "blocks.0.to_q").amax < 100
    with pytest.raises(
        CalibrationError, match=rf"blocks\.0\.to_q: {K} of the {K * 33:,} values .* NaN or Inf"
    ) as error:
        calibration.scales(m)
    assert error.value.layers == ("blocks.0.to_q", "blocks.0.to_k")
    kept = calibration.scales(m, ignored_layers=["blocks.0.to_*"])
    assert len(kept) == 6
    for misspelt in ("", "img_mpl"):
        with pytest.raises(PatternError):
            calibration.scales(m, ignored_layers=[misspelt])
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="'unknown' matched no layer"):
        assert calibration.scales(m, ignored_layers=["blocks.0.to_*", "unknown"]) == kept

    with calibrate(m, progress=False) as calibration:
        m(0 * x)
    with pytest.raises(CalibrationError, match=r"blocks\.0\.to_q: its input was always zero"):
        calibration.scales(m)
    sparse = torch.zeros(1, 1000, K)
    sparse[0, 0, 0] = 1
    with calibrate(m.float(), progress=False) as calibration:
        m.blocks[0].to_q(sparse)
        m(torch.randn(1, 3, K))
    assert calibration.scales(m)["blocks.0.to_q"] > 0
    with pytest.raises(CalibrationError, match=r"blocks\.0\.to_q: percentile 50 of its input is zero"):
        calibration.scales(m, "percentile", percentile=50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "max"}, "algorithm='max' is not valid; valid: amax, percentile, mse"),
        ({"percentile": 0}, "percentile=0: expected a number above 0"),
        ({"percentile": math.nan}, "percentile=nan"),
        ({"percentile": True}, "percentile=True"),
    ],
)
def test_options_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Calibration({}, {}).scales(model(1), **arguments)


def test_another_model_is_refused() -> None:
    m = model(1)
    calibration = recorded(m, tokens())
    wider = model(1)
    wider.blocks[0].to_q = nn.Linear(K, 2 * K)
    fused = model(1)
    fused.blocks[0].to_qkv = nn.Linear(K, K)
    fewer = model(1)
    del fewer.blocks[0].to_k
    for other, message in (
        (model(2), r"the calibrated model had no blocks\.1\..* \(3 more differ\)"),
        (wider, r"the weight of blocks\.0\.to_q has the shape \(128, 64\) in this model, and had \(64, 64\)"),
        (fused, r"the calibrated model had no blocks\.0\.to_qkv"),
        (fewer, r"this model has no blocks\.0\.to_k"),
        (nn.Linear(K, K), "it is of a Model, and this model is a Linear"),
    ):
        with pytest.raises(CalibrationError, match=f"calibration of another model: 'model': {message}"):
            calibration.scales(other)
    assert calibration.scales(torch.compile(model(1), backend="eager")) == calibration.scales(m)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        calibration.scales("m")  # type: ignore[arg-type]


def test_it_holds_nothing_within_the_block(tmp_path: Path) -> None:
    m = model(1)
    with calibrate(m, progress=False) as calibration:
        m(tokens())
        for act in (lambda: calibration.scales(m), lambda: calibration.save(tmp_path / "scales.json")):
            with pytest.raises(CalibrationError, match="leave the block of calibrate first"):
                act()
    assert calibration.scales(m)


# --- files ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    m = model(1)
    with torch.no_grad(), calibrate(m, progress=False) as calibration:
        m(tokens())
        m.blocks[0].to_q(tokens() * torch.nan)
        m(0.1 * tokens())
    for suffix in ("json", "safetensors"):
        calibration.save(folder / f"scales.{suffix}")
    return folder


def test_both_formats_hold_the_same(saved: Path) -> None:
    a, b = (load_calibration(saved / f"scales.{suffix}") for suffix in ("json", "safetensors"))
    assert same(a, b)
    assert a.environment == b.environment
    assert {"torch", "fp8-compile", "date"} <= a.environment.keys()
    assert layer_of(a, "blocks.0.to_q").nonfinite == 32 * K
    assert sorted(path.name for path in saved.iterdir()) == ["scales.json", "scales.safetensors"]


def test_json_can_be_read_by_people(saved: Path) -> None:
    lines = (saved / "scales.json").read_text().splitlines()
    assert '   "class": "Model",' in lines
    assert sum(line.startswith('     "paths": ["blocks.0.') for line in lines) == 4
    assert sum(line.startswith('    "blocks.0.') for line in lines) == 4  # linears


Damage = Callable[[dict[str, Any]], Any]


def layer_with(key: str, value: Any) -> Damage:
    def damage(data: dict[str, Any]) -> None:
        data["models"][0]["layers"][1][key] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(version=2), "version: 2 is not known; this release reads version 1"),
        (lambda d: d.update(version=True), "version: expected int, got True"),
        (lambda d: d.pop("format"), "format: is missing"),
        (lambda d: d.update(format="x"), "format: expected 'fp8_compile.calibration', got 'x'"),
        (lambda d: d.update(bins_per_octave=16), "bins_per_octave: expected 32, got 16"),
        (lambda d: d.update(models=[]), "models: expected at least one"),
        (lambda d: d.update(models=d["models"] * 2), "models: two have the same name"),
        (lambda d: d["models"][0].pop("layers"), "models[0].layers: is missing"),
        (lambda d: d["models"][0].update(digest="0"), "models[0].digest: expected "),
        (lambda d: d["models"][0]["linears"].popitem(), "is no layer of this model"),
        (lambda d: d["models"][0]["linears"].update(x=[0.5, 1]), "models[0].linears.x: expected [output features"),
        (lambda d: d["models"][0]["steps"].append([0, 1]), "models[0].steps[2]: expected [generation, index"),
        (lambda d: d["models"][0]["steps"].append([0, 2, None]), "ranges: expected one for each of the 3 steps"),
        (lambda d: d["models"][0]["inputs"][0].update(calls=0), "models[0].inputs[0].calls: expected a number from 1"),
        (layer_with("amax", -1.0), "models[0].layers[1].amax: expected a finite number from 0, got -1.0"),
        (layer_with("amax", math.nan), "models[0].layers[1].amax: expected a finite number from 0, got nan"),
        (layer_with("amax", 0.0), "models[0].layers[1].amax: 0 is not in the highest bin"),
        (layer_with("amax", "3"), "models[0].layers[1].amax: expected int or float, got '3'"),
        (layer_with("amax", 1e39), "models[0].layers[1].amax: expected a finite number from 0, got 1e+39"),
        (layer_with("paths", []), "models[0].layers[1].paths: expected at least one path"),
        (layer_with("paths", ["blocks.0.to_q"]), "models[0].layers[1].paths: 'blocks.0.to_q' is there twice"),
        (layer_with("nonfinite", 1), "do not add up to values"),
        (layer_with("values", 1.5), "models[0].layers[1].values: expected int, got 1.5"),
        (layer_with("rows", [1]), "models[0].layers[1].rows: expected the fewest and the most"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_damaged_files_are_refused(saved: Path, tmp_path: Path, suffix: str, damage: Damage, message: str) -> None:
    file = tmp_path / f"damaged.{suffix}"
    if suffix == "json":
        data = json.loads((saved / "scales.json").read_text())
        damage(data)
        file.write_text(json.dumps(data))
    else:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(saved / "scales.safetensors", framework="pt") as opened:
            data = json.loads(opened.metadata()["calibration"])
        damage(data)
        tensors = load_file(saved / "scales.safetensors")
        if len(data.get("models") or ()) == 2:
            tensors |= {name.replace("0.", "1."): tensor.clone() for name, tensor in tensors.items()}
        save_file(tensors, file, metadata={"calibration": json.dumps(data)})
    with pytest.raises(CalibrationError) as error:
        load_calibration(file)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)
    assert error.value.file == str(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (layer_with("histogram", [[8000, 5], [8000, 5]]), "models[0].layers[1].histogram: expected each bin once"),
        (
            layer_with("histogram", [[8160, 5]]),
            "models[0].layers[1].histogram[0]: expected [bin, count], got [8160, 5]",
        ),
        (layer_with("histogram", [[1, -5]]), "models[0].layers[1].histogram[0]: expected [bin, count], got [1, -5]"),
        (layer_with("ranges", [None, 1e9]), "models[0].layers[1].ranges: 1e+09 is above the amax"),
        (layer_with("ranges", [None, -1]), "models[0].layers[1].ranges[1]: expected a finite number from 0, or null"),
        (lambda d: d["models"][0].update(layers=[3]), "models[0].layers[0]: expected an object, got 3"),
    ],
)
def test_damaged_arrays_are_refused(saved: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    data = json.loads((saved / "scales.json").read_text())
    damage(data)
    (tmp_path / "damaged.json").write_text(json.dumps(data))
    with pytest.raises(CalibrationError) as error:
        load_calibration(tmp_path / "damaged.json")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["ranges", "lengths", "bins", "counts"])
def test_damaged_tensors_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    source, file = saved / "scales.safetensors", tmp_path / "damaged.safetensors"
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata()
    for damage in (lambda t: None, lambda t: t.double(), lambda t: t[1:].clone(), lambda t: t[None]):
        tensors = load_file(source)
        made = damage(tensors.pop(f"0.{name}"))
        save_file(tensors | ({} if made is None else {f"0.{name}": made}), file, metadata=metadata)
        with pytest.raises(CalibrationError, match=rf"0\.{name}|0\.bins and 0\.counts"):
            load_calibration(file)
    save_file(load_file(source), file)
    with pytest.raises(CalibrationError, match="the metadata have no 'calibration'"):
        load_calibration(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.json", None, "cannot be read: .*No such file"),
        ("missing.safetensors", None, "cannot be read: .*No such file"),
        ("text.json", b"scales", "is no calibration: Expecting value"),
        ("bytes.json", b"\xff\xfe", "is no calibration: "),
        ("list.json", b"[]", r"the whole: expected an object, got \[\]"),
        ("text.safetensors", b"scales", "is no calibration: "),
        ("scales.pt", b"", r"expected a name that ends in \.json or \.safetensors"),
    ],
)
def test_what_is_no_calibration(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tmp_path / name)


def test_what_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    calibration = load_calibration(saved / "scales.json")
    for path, message in ((tmp_path / "none" / "scales.json", "cannot be written"), (tmp_path / "a.pt", "a name that")):
        with pytest.raises(CalibrationError, match=message):
            calibration.save(path)
    with pytest.raises(CalibrationError, match="cannot be written"):
        calibration.save(tmp_path / "none" / "scales.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_denoiser_that_never_ran_and_one_that_ran_in_no_step(tmp_path: Path, suffix: str) -> None:
    high, low = model(1), model(2)
    with pytest.warns(UncalibratedLayersWarning), calibrate(high=high, low=low, progress=False) as calibration:
        high.blocks[0](tokens())
    calibration.save(tmp_path / f"scales.{suffix}")
    loaded = load_calibration(tmp_path / f"scales.{suffix}")
    assert loaded.scales(high) == calibration.scales(high)
    assert len(loaded.scales(high)) == 4
    with pytest.raises(CalibrationError, match="no linear of 'low' ran while it was calibrated"):
        loaded.scales(low)
    assert len(loaded.problems(low)) == 8
    assert "low: Model, 0 layers in 0 steps of 0 generations" in loaded.table()


# --- the table ---


def test_the_worst_layers_come_first() -> None:
    m, x = model(2), tokens()
    with calibrate(m, progress=False) as calibration:
        m(x)
        huge = torch.ones(1, K, dtype=torch.bfloat16)
        huge[0, 0] = 1e6  # 448 of which the others are far below
        m.blocks[1].to_k(huge)
    lines = calibration.table(worst=3).splitlines()
    assert lines[0].startswith("model: Model, 8 layers in 1 steps of 1 generations; layers ")
    assert len(lines) == 2 + 3
    assert lines[2].split()[:2] == ["blocks.1.to_k", "9.994e+05"]
    assert float(lines[2].split()[-4]) > 99  # percent
    with pytest.raises(CalibrationError, match="worst: expected a number of at least 1, got 0"):
        calibration.table(worst=0)
