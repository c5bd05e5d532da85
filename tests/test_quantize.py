"""Models converted at load time: the same bits as compiled ones, the same report, and nothing converted behind them."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fp8_compile
from fp8_compile import Fp8DiffusionConfig, QuantizedWeight
from fp8_compile.runtime import constants
from fp8_compile.schemes.fp8 import Fp8
from tests.support.blocks import LOAD, OPTIONS, WIDTH, Block, Model, model, tokens
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

COMPILE: dict[str, Any] = {"inner_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compile_only(m: nn.Module, x: Tensor, **options: Any) -> Tensor:
    twin = copy.deepcopy(m)
    out = torch.compile(twin, backend="fp8_diffusion", fullgraph=True, options={**OPTIONS, **options})(x)
    torch.compiler.reset()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignored_layers": ["img_mlp.2"]},
        {"ignored_layers": ["blocks.0.*", "to_k"]},
        {"granularity": "tensor"},
        {"min_m": 64},
        {"min_m": 64, "granularity": "tensor"},
    ],
)
def test_the_same_bits_as_compiling_alone(options: dict[str, Any]) -> None:
    m, x = model(), tokens()
    expected = compile_only(m, x, **options)
    fp8_compile.quantize_(m, {**LOAD, **options})
    eager = m(x)
    m.compile(backend="fp8_diffusion", fullgraph=True, options=COMPILE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.equal(m(x), expected)
    assert sqnr(expected, eager) > 24


def test_blocks_share_a_graph_for_each_combination_of_weights() -> None:
    m, x = model(5), tokens()
    ignored = ["blocks.0.*", "blocks.3.img_mlp"]
    expected = compile_only(m, x, ignored_layers=ignored)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ignored})
    counter = CompileCounterWithBackend("aot_eager")
    for block in m.blocks:
        block.compile(backend="fp8_diffusion", fullgraph=True, options={"inner_backend": counter})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that nothing of a block was converted is what was asked for
        for _ in range(3):
            assert torch.equal(m(x), expected)
    assert counter.frame_count == 3
    kept = {row.path: row.reason for row in fp8_compile.report(m).layers if row.decision == "unquantized"}
    assert kept["blocks.0.to_q"] == "ignored_layers: blocks.0.*"
    assert kept["blocks.3.img_mlp.2"] == "ignored_layers: blocks.3.img_mlp"
    assert len(kept) == 6


def test_strict_fails_where_all_was_kept_at_load() -> None:
    m = model(1)
    with pytest.warns(fp8_compile.NothingConvertedWarning):
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["blocks"]})
    m.compile(backend="fp8_diffusion", fullgraph=True, options={**OPTIONS, "strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        m(tokens())
    assert isinstance(raised.value.inner_exception, fp8_compile.NothingConvertedError)


def test_what_was_kept_stays_kept_beside_a_model_that_is_compiled_alone() -> None:
    """Their graphs have the same code and the same options; what tells them apart is what the models remember."""
    loaded, other, x = model(1), model(1), tokens()
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="none of the 4 linears of this model"):
        fp8_compile.quantize_(loaded, {**LOAD, "ignored_layers": ["blocks"]})
    before, others = loaded(x), other(x)
    for m in (loaded, other, loaded, other):
        m.compile(backend="fp8_diffusion", fullgraph=True, options=OPTIONS)
    assert torch.equal(loaded(x), before)
    assert torch.equal(other(x), others)  # once as written: Dynamo knows only the graph of the first
    other(x)
    assert fp8_compile.report(other).totals["quantized"] == 4
    assert torch.equal(loaded(x), before)
    assert fp8_compile.report(loaded).totals["quantized"] == 0


def test_the_report_before_and_after_compilation() -> None:
    m = model(2)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_k"]})
    size = WIDTH * WIDTH
    for compiled in (False, True):
        if compiled:
            m.compile_blocks()(tokens())
        report = fp8_compile.report(m)
        rows = {row.path: row for row in report.layers}
        first, kept = rows["blocks.0.to_q"], rows["blocks.1.to_k"]
        assert (first.decision, first.scheme) == ("quantized", "fp8-row")
        assert (first.bytes_before, first.bytes_after) == (2 * size, size + 4 * WIDTH)
        assert (kept.decision, kept.reason, kept.bytes_after) == ("unquantized", "ignored_layers: to_k", 2 * size)
        assert first.reason == ("" if compiled else "in no graph that the backend compiled")
        assert report.totals["extra_bytes"] == 0
        assert len(report.graphs) == compiled


class Modulated(nn.Module):
    """A modulation that sees one row, as in every diffusion transformer, beside a projection that sees all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(WIDTH, WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.proj(x * (1 + self.mod(t)[:, None]))


def test_small_m_are_multiplied_by_the_fp8_weight_alone() -> None:
    m = Modulated().bfloat16()
    x, t = tokens(), torch.randn(1, WIDTH).bfloat16()
    expected = torch.compile(copy.deepcopy(m), backend="fp8_diffusion", fullgraph=True, options=OPTIONS)(x, t)
    fp8_compile.quantize_(m, LOAD)
    m.compile(backend="fp8_diffusion", fullgraph=True, options=COMPILE)
    assert torch.equal(m(x, t), expected)
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert (rows["mod"].decision, rows["mod"].scheme) == ("quantized", "fp8-weight-only")
    assert rows["proj"].scheme == "fp8-row"


@pytest.mark.parametrize("load", [fp8_compile.quantize_, lambda m, options: Fp8DiffusionConfig(**options)])
def test_at_load_time_layers_with_small_m_are_not_kept_and_asking_for_it_is_an_error(load: Any) -> None:
    m = Modulated().bfloat16()
    with pytest.raises(fp8_compile.OptionError, match=r"small_m='keep': at load time .* 'weight-only'.*ignored_layers"):
        load(m, {**LOAD, "small_m": "keep"})
    assert not any(isinstance(p, QuantizedWeight) for p in m.parameters())


def test_compiling_with_another_granularity_than_the_weights_have_is_an_error() -> None:
    m, x = model(), tokens()
    fp8_compile.quantize_(m, LOAD)
    compiled = torch.compile(m, backend="fp8_diffusion", options={**COMPILE, "granularity": "tensor"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"granularity='tensor': .* granularity='row'"):
        compiled(x)
    fp8_compile.quantize_(other := model(), {**LOAD, "granularity": "tensor"})
    for given in ({"granularity": "tensor"}, {}, {"method": "fp8"}):  # what is not given agrees
        torch.compile(other, backend="fp8_diffusion", options={**COMPILE, **given})(x)
    assert {row.scheme for row in fp8_compile.report(other).layers} == {"fp8-tensor"}
    for given, message in (
        ({"granularity": "row"}, r"granularity='row': .* granularity='tensor'"),  # a default that is given asks for it
        ({"activation_scheme": "static"}, r"activation_scheme='static': .* activation_scheme='dynamic'"),
    ):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
            torch.compile(other, backend="fp8_diffusion", options={**COMPILE, **given})(x)


def test_what_makes_no_difference_to_constants_may_be_chosen_when_compiling() -> None:
    m = Modulated().bfloat16()
    x, t = tokens(), torch.randn(1, WIDTH).bfloat16()
    fp8_compile.quantize_(m, LOAD)
    expected = m(x, t)
    for options, mod, reason in (
        ({"min_m": 1}, "fp8-row", ""),
        ({"min_m": 100}, "fp8-weight-only", ""),
        ({"small_m": "keep"}, "", "M is below min_m 8; its quantized weight is dequantized"),
    ):
        torch.compiler.reset()
        m._compiled_call_impl = None
        m.compile(backend="fp8_diffusion", fullgraph=True, options={**COMPILE, **options})
        assert sqnr(expected, m(x, t)) > 27
        row = next(row for row in fp8_compile.report(m).layers if row.path == "mod")
        assert (row.scheme, row.reason) == (mod, reason)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_activations_may_stay_as_they_are(granularity: str) -> None:
    """Each entrance gives the bits of eager mode on converted weights; one row or many."""
    given = {"granularity": granularity, "activation_scheme": "none"}
    m = Modulated().bfloat16()
    x, t = tokens(), torch.randn(1, WIDTH).bfloat16()
    online = torch.compile(copy.deepcopy(m), backend="fp8_diffusion", fullgraph=True, options={**OPTIONS, **given})
    first = online(x, t)
    dynamic = copy.deepcopy(m)
    fp8_compile.quantize_(dynamic, {**LOAD, "granularity": granularity})
    fp8_compile.quantize_(m, {**LOAD, **given})
    eager = m(x, t)
    assert torch.equal(eager, dynamic(x, t))  # the same constants
    for converted in (m, dynamic):
        torch.compiler.reset()
        # Those that were converted with scales for activations may be asked not to use them.
        options = COMPILE if converted is m else {**COMPILE, "activation_scheme": "none"}
        converted.compile(backend="fp8_diffusion", fullgraph=True, options=options)
        assert torch.equal(converted(x, t), first)
        assert {row.scheme for row in fp8_compile.report(converted).layers} == {"fp8-weight-only"}
    assert sqnr(eager, first) > 45  # one row is summed in float32 when it is compiled
    torch.compiler.reset()
    torch.compile(dynamic.proj, backend="fp8_diffusion", dynamic=True, options={**COMPILE, **given})(x)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_that_autocast_would_cast(dtype: torch.dtype, converted: bool) -> None:
    m = nn.Linear(WIDTH, WIDTH).to(dtype)
    m.bias = nn.Parameter(m.bias.float(), requires_grad=False)
    x = torch.randn(64, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        expected = m(x)
    if converted:
        fp8_compile.quantize_(m, LOAD)
    m.compile(backend="fp8_diffusion", options={**OPTIONS, "activation_scheme": "none"})
    with torch.autocast("cpu", torch.bfloat16):
        out = m(x)
    assert out.dtype == expected.dtype
    assert sqnr(expected, out) > 27


def test_quantized_weights_that_no_fp8_matmul_takes_are_still_read_as_they_are() -> None:
    """Of others' checkpoints, which have no multiples of 16 in mind."""
    m, t = nn.Linear(WIDTH, 72).bfloat16(), torch.randn(1, WIDTH).bfloat16()
    m.weight = nn.Parameter(QuantizedWeight.quantize(m.weight, Fp8()), requires_grad=False)
    expected = m(t), m(tokens())
    compiled = torch.compile(m, backend="fp8_diffusion", options={**COMPILE, "min_features": 16})
    assert sqnr(expected[0], compiled(t)) > 40
    assert fp8_compile.report(m).layers[0].scheme == "fp8-weight-only"
    assert sqnr(expected[1], compiled(tokens())) < 100  # dequantized, with the reason
    assert "out_features 72 is not a multiple of 16" in fp8_compile.report(m).layers[0].reason


def test_weights_of_torchao_keep_their_scheme_and_other_options_are_an_error() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for options, message in (
        ({"granularity": "tensor"}, "granularity='tensor': the weights were quantized with granularity='row'"),
        ({"method": "other"}, "method='other' is not valid"),
    ):
        m = model(1)
        layer = m.blocks[0].to_q
        made = quantization.Float8Tensor.from_hp(layer.weight, torch.float8_e4m3fn, quantization.PerRow())
        layer.weight = nn.Parameter(made, requires_grad=False)
        with pytest.raises(fp8_compile.OptionError, match=message):
            fp8_compile.quantize_(m, {**LOAD, **options})
        assert not any(isinstance(p, QuantizedWeight) for p in m.parameters())


def test_one_layer_with_small_m_and_many() -> None:
    class Twice(Modulated):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.proj(x) + self.proj(t)[:, None]

    m = Twice().bfloat16()
    x, t = tokens(), torch.randn(1, WIDTH).bfloat16()
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["mod"]})
    expected = m(x, t)
    m.compile(backend="fp8_diffusion", fullgraph=True, options=COMPILE)
    assert sqnr(expected, m(x, t)) > 27


def test_an_fp8_weight_used_otherwise_is_dequantized_and_the_report_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(WIDTH, WIDTH)
            self.back = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return (self.proj(x) @ self.back.weight) + self.back.weight.sum()

    m, x = Odd().bfloat16(), tokens()
    fp8_compile.quantize_(m, LOAD)
    expected = m(x)
    m.compile(backend="fp8_diffusion", fullgraph=True, options=COMPILE)
    assert sqnr(expected, m(x)) > 27
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert rows["proj"].decision == "quantized"
    assert rows["back"].reason == "used with its features exchanged; its quantized weight is dequantized"


def test_a_pattern_of_the_compilation_leaves_an_fp8_layer_to_dequantization() -> None:
    m, x = model(1), tokens()
    fp8_compile.quantize_(m, LOAD)
    expected = m(x)
    m.compile(backend="fp8_diffusion", fullgraph=True, options={**COMPILE, "ignored_layers": ["img_mlp"]})
    assert 27 < sqnr(expected, m(x)) < 60
    rows = {row.path: row.reason for row in fp8_compile.report(m).layers}
    assert rows["blocks.0.img_mlp.0"] == "ignored_layers: img_mlp; its quantized weight is dequantized"


# --- whatever happens to the weights afterwards ---


def test_after_an_edit_the_next_result_is_right() -> None:
    m, x = model(), tokens()
    fp8_compile.quantize_(m, LOAD)
    m.compile_blocks()
    m(x), m(x)

    def fresh() -> Tensor:
        twin = copy.deepcopy(m)
        for block in twin.blocks:
            block._compiled_call_impl = None
        return twin.compile_whole()(x)

    seen = [m(x)]
    target: Any = m.blocks[1].to_q.weight
    other = nn.Parameter(QuantizedWeight.quantize(torch.randn(WIDTH, WIDTH).bfloat16(), Fp8()), requires_grad=False)
    for edit in (
        lambda: target.mul_(-1.5),
        lambda: target.data.add_(1),  # hidden from version counters
        lambda: m.load_state_dict(model().state_dict()),
        lambda: setattr(m.blocks[1].to_q, "weight", other),
    ):
        edit()
        out = m(x)
        assert all(not torch.equal(out, before) for before in seen)
        assert torch.equal(out, fresh())
        seen.append(out)
    assert fp8_compile.refresh(m) == []


def test_a_compiled_model_can_be_moved_and_is_still_known() -> None:
    m, x = model(), tokens()
    fp8_compile.quantize_(m, LOAD)
    m.compile_blocks()
    expected = m(x), m(x)
    addresses = [block.to_q.weight.qdata.data_ptr() for block in m.blocks]
    for block in m.blocks:
        for p in block.parameters():
            p.data = p.data.clone()
    m.to(torch.float16).to(torch.bfloat16)
    assert addresses != [block.to_q.weight.qdata.data_ptr() for block in m.blocks]
    before = fp8_compile.report(m)
    assert before.totals["quantized"] == 12
    assert before.layers[0].reason == ""
    assert torch.equal(m(x), expected[0])
    assert torch.equal(m(x), expected[0])


def test_a_deleted_model_leaves_nothing() -> None:
    m, x = model(), tokens()
    fp8_compile.quantize_(m, LOAD)
    m.compile_blocks()
    m(x), m(x)
    watched = [weakref.ref(m.blocks[0].to_q.weight.qdata), weakref.ref(m.blocks[0].to_q.weight.identity)]
    known = len(constants.STATES)
    del m
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert len(constants.STATES) == known - 12


# --- what is converted ---


def test_weights_that_the_backend_would_keep_are_kept_for_the_same_reasons() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(WIDTH, WIDTH)
            self.narrow = nn.Linear(WIDTH, 32)
            self.odd = nn.Linear(WIDTH, 72)
            self.single = nn.Linear(WIDTH, WIDTH).float()
            self.embedding = nn.Embedding(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, WIDTH, bias=False)
            self.head.weight = self.embedding.weight
            self.again = nn.Linear(WIDTH, WIDTH)
            self.again.weight = self.plain.weight

    m = Mixed().bfloat16()
    m.single.float()
    fp8_compile.quantize_(m, LOAD)
    assert m.plain.weight is m.again.weight
    assert isinstance(m.plain.weight, QuantizedWeight)
    assert m.head.weight is m.embedding.weight
    kept = {row.path: row.reason for row in fp8_compile.report(m).layers if row.decision == "unquantized"}
    assert kept == {
        "narrow": "narrower than min_features 64",
        "odd": "out_features 72 is not a multiple of 16",
        "single": "weight is float32, not bfloat16 or float16",
        "embedding": "weight is shared with embedding.weight",
        "head": "weight is shared with embedding.weight",
    } or (kept == {k: v for k, v in kept.items() if k != "embedding"} and len(kept) == 4)
    assert type(m.narrow.weight) is nn.Parameter


def test_twice_changes_nothing() -> None:
    m = model(1)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_k"]})
    before = {name: p for name, p in m.named_parameters()}
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="1 x ignored_layers: to_k"):
        fp8_compile.quantize_(m, LOAD)
    assert all(p is before[name] for name, p in m.named_parameters())


def test_a_second_call_tells_what_it_cannot_do_any_more() -> None:
    m = model(1)
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_k"]})
    with pytest.raises(fp8_compile.PatternError, match=r"'to_q': names blocks\.0\.to_q, which is quantized already"):
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_q"]})
    with pytest.warns(fp8_compile.NothingConvertedWarning, match=r"none of the 1 linears .* not quantized yet \(3"):
        fp8_compile.quantize_(m, {**LOAD, "strict": True})  # not strict's business: the model is in FP8


def test_a_part_first_and_then_the_whole() -> None:
    m = model(2)
    fp8_compile.quantize_(m.blocks[0], LOAD)
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match=r"'to_k' names blocks\.0\.to_k too"):
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["to_k"]})
    assert isinstance(m.blocks[0].to_k.weight, QuantizedWeight)
    assert isinstance(m.blocks[1].to_q.weight, QuantizedWeight)
    assert not isinstance(m.blocks[1].to_k.weight, QuantizedWeight)
    with pytest.raises(fp8_compile.PatternError, match="did you mean"):
        fp8_compile.quantize_(m.blocks[0], {**LOAD, "ignored_layers": ["to_kk"]})
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="all 4 linears of this model are quantized already"):
        fp8_compile.quantize_(m.blocks[0], {**LOAD, "granularity": "tensor"})


def test_patterns() -> None:
    m = model(2)
    with pytest.raises(fp8_compile.PatternError, match="did you mean 'img_mlp'"):
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["img_mpl"]})
    assert not any(isinstance(p, QuantizedWeight) for p in m.parameters())
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="'vision_tower' matched none of the 8 linears"):
        fp8_compile.quantize_(m, {**LOAD, "ignored_layers": ["blocks.1.*", "vision_tower"]})
    report = fp8_compile.report(m)
    assert report.unmatched_patterns == ("vision_tower",)
    assert {row.path.split(".")[1] for row in report.layers if row.decision == "quantized"} == {"0"}


def test_what_cannot_be_done_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fp8_compile.quantize_("transformer")  # type: ignore[arg-type]
    with pytest.raises(fp8_compile.NothingConvertedError, match="4 x narrower than min_features 5000"):
        fp8_compile.quantize_(model(1), {"min_features": 5000, "strict": True})
    with pytest.raises(fp8_compile.UnsupportedDeviceError, match="mps"):
        fp8_compile.quantize_(model(1), LOAD, device="mps")
    with pytest.raises(fp8_compile.OptionError, match="did you mean 'ignored_layers'"):
        fp8_compile.quantize_(model(1), {"ignore_layers": ["img_mlp"]})


def test_nan_and_inf_are_named_and_the_rest_is_converted() -> None:
    m = model(2)
    m.blocks[0].to_q.weight[3, 5] = float("nan")
    m.blocks[1].img_mlp[2].weight[0, 0] = float("inf")
    with pytest.raises(fp8_compile.NonFiniteWeightError, match=r"blocks\.0\.to_q.*blocks\.1\.img_mlp\.2") as error:
        fp8_compile.quantize_(m, LOAD)
    assert error.value.layers == ("blocks.0.to_q", "blocks.1.img_mlp.2")
    assert fp8_compile.report(m).totals["quantized"] == 6
    assert m.blocks[0].to_q.weight[3, 5].isnan()


def test_no_more_than_one_layer_is_held_twice() -> None:
    """The BF16 weight of a layer is free before the next layer is quantized."""
    m = model(3)
    alive = {name: weakref.ref(p) for name, p in m.named_parameters() if p.dim() == 2}
    counts: list[int] = []
    original = QuantizedWeight.quantize.__func__  # type: ignore[attr-defined]

    def counting(cls: type, weight: Tensor, *args: Any, **kwargs: Any) -> QuantizedWeight:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive.values()))
        return original(cls, weight, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedWeight, "quantize", classmethod(counting))
        fp8_compile.quantize_(m, LOAD, device="cpu")
    assert counts == list(range(12, 0, -1))


def test_a_model_on_meta() -> None:
    with torch.device("meta"):
        m = Model(1).bfloat16()
    fp8_compile.quantize_(m, LOAD)
    assert {type(p) for p in m.parameters() if p.dim() == 2} == {QuantizedWeight}
    m.to_empty(device="cpu").load_state_dict(model(1).state_dict())
    assert sqnr(Block.forward(m.blocks[0], x := tokens()), m(x)) > 60


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_torchao_weights_are_used_as_they_are(granularity: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    m, x = model(1), tokens()
    kind = quantization.PerRow() if granularity == "row" else quantization.PerTensor()
    addresses = {}
    for name, layer in m.named_modules():
        if isinstance(layer, nn.Linear):
            made = quantization.Float8Tensor.from_hp(layer.weight, torch.float8_e4m3fn, kind)
            layer.weight = nn.Parameter(made, requires_grad=False)
            addresses[name] = made.qdata.data_ptr()
    expected = m(x)
    fp8_compile.quantize_(m, LOAD)
    assert {n: p.weight.qdata.data_ptr() for n, p in m.named_modules() if isinstance(p, nn.Linear)} == addresses
    assert sqnr(expected, m(x)) > 40
    m.compile_whole()
    assert sqnr(expected, m(x)) > 24
    assert {row.scheme for row in fp8_compile.report(m).layers} == {f"fp8-{granularity}"}


# --- real models ---


@pytest.mark.parametrize("name", ["QwenImage", "ZImage", "Flux"])
def test_real_transformers(name: str) -> None:
    tiny = MODELS[name]
    m: Any = tiny.build()
    options = {"min_features": 64, "ignored_layers": ["to_v"]}
    expected = tiny.output(m(**tiny.inputs(0)))

    def compiled(transformer: Any, **own: Any) -> Tensor:
        torch.compiler.reset()
        transformer.compile_repeated_blocks(
            backend="fp8_diffusion", fullgraph=True, options={"inner_backend": "aot_eager", **own}
        )
        return [tiny.output(transformer(**tiny.inputs(0))) for _ in range(2)][1]

    alone = compiled(copy.deepcopy(m), **options)
    loaded = copy.deepcopy(m)
    # Outside of the blocks nothing is compiled: there, compiling alone leaves BF16.
    blocks = {path for path, module in m.named_modules() if type(module).__name__ in m._repeated_blocks}
    outside = [
        f"re:^{path}$"
        for path, module in m.named_modules()
        if isinstance(module, nn.Linear) and not any(path.startswith(f"{block}.") for block in blocks)
    ]
    fp8_compile.quantize_(loaded, {**options, "ignored_layers": ["to_v", *outside]})
    assert torch.equal(compiled(loaded), alone)
    assert sqnr(expected, alone) > 22
    fp8_compile.quantize_(m, {"min_features": 64})
    assert sqnr(expected, compiled(m)) > 20
    assert not [row for row in fp8_compile.report(m).layers if row.decision == "unquantized" and "attn" in row.path]


@pytest.mark.parametrize("name", ["t5", "clip", "qwen"])
def test_text_encoders(name: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    m: Any
    if name == "t5":
        m = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=100, d_model=64, d_ff=128, d_kv=32, num_layers=2, num_heads=2)
        )
    elif name == "clip":
        m = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
        )
    else:
        from bench.tiny import _text_encoder, _tokenizer

        m = _text_encoder(_tokenizer())
    m = m.bfloat16().eval()
    inputs = {"input_ids": torch.arange(24)[None] + 3, "output_hidden_states": True}
    if name == "qwen":
        inputs["attention_mask"] = torch.ones(1, 24, dtype=torch.int64)

    def run() -> Tensor:
        return m(**inputs).hidden_states[-1]

    expected = run()
    unconverted = copy.deepcopy(m)
    with pytest.warns(fp8_compile.NothingConvertedWarning):
        fp8_compile.quantize_(unconverted, {"min_features": 5000})
    unconverted.save_pretrained(tmp_path / "unconverted")
    fp8_compile.quantize_(m, {"min_features": 64})
    assert sqnr(expected, run()) > 25
    with pytest.raises(ValueError, match="quantized with fp8_diffusion and is not serializable"):
        m.save_pretrained(tmp_path)
    m.compile(backend="fp8_diffusion", options=COMPILE)
    assert sqnr(expected, run()) > 20
    assert fp8_compile.report(m).totals["quantized"] >= 12
