"""What a scheme promises, for those of this package and one that a test registers; and the table of methods."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fp8_compile
from fp8_compile import (
    OptionError,
    QuantizedWeight,
    Scheme,
    Spec,
    UnknownMethodError,
    numerics,
    register_method,
    schemes,
)
from fp8_compile.checks import parse_options
from fp8_compile.runtime.constants import _make
from fp8_compile.schemes import finite, scheme_for, scheme_named
from fp8_compile.schemes import scheme as scheme_module
from fp8_compile.schemes.fp8 import (
    BLOCK_SIZES,
    BLOCKS,
    DEQUANTIZED,
    DEQUANTIZED_BLOCKS,
    ROWWISE,
    ROWWISE_UNFUSED_SCALES,
    TENSORWISE,
    WEIGHT_ONLY,
    WEIGHT_ONLY_BLOCKS,
    Fp8,
)
from fp8_compile.schemes.int8 import Int8
from tests.support import methods as ours
from tests.support.blocks import LOAD, OPTIONS, WIDTH, model, tokens
from tests.support.methods import HOW, Doubled
from tests.support.sqnr import sqnr

CPU = torch.device("cpu")
BLOCKWISE = [Fp8(weight_block_size=size) for size in BLOCK_SIZES]
NONE = Fp8(activation_scheme="none")
ALL = [
    Fp8(),
    Fp8("tensor"),
    NONE,
    *BLOCKWISE,
    Fp8(activation_scheme="none", weight_block_size=(128, 128)),
    Fp8(min_m=3, small_m="keep"),
    Int8(),
    Int8(3, "keep"),
    Int8(rotation=64),
    Doubled(),
    Doubled(3),
]
EACH = pytest.mark.parametrize("scheme", ALL, ids=repr)
METHOD = {"method": "doubled"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemes, "_METHODS", dict(schemes._METHODS))
    register_method(Doubled)


# --- every scheme ---


@EACH
def test_a_scheme_is_told_by_its_name_and_its_options(scheme: Scheme, doubled: None) -> None:
    """Dynamo copies what `__tensor_flatten__` gives and compares it with ``==``."""
    assert copy.deepcopy(scheme) == pickle.loads(pickle.dumps(scheme)) == scheme
    assert scheme_named(scheme.method, scheme.options) == scheme
    assert [other for other in ALL if other == scheme] == [scheme]


@EACH
@pytest.mark.parametrize("transposed", [False, True])
def test_constants_are_as_the_specs_say(scheme: Scheme, transposed: bool) -> None:
    """In the graph they are described by the specs alone."""
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    made = _make(scheme, nn.Parameter(weight.t() if transposed else weight), transposed)
    specs = scheme.specs(32, 64).values()
    assert [(tuple(c.shape), c.dtype) for c in made] == [(spec.shape, spec.dtype) for spec in specs]
    assert all(c.is_contiguous() and not c.requires_grad for c in made)
    assert scheme.weight_shape(made) == (32, 64)
    for whole, part in zip(made, scheme.quantize_in_chunks(weight), strict=True):
        assert torch.equal(whole.float(), part.float())
    assert sqnr(weight, scheme.dequantize(made, torch.bfloat16)) > 24
    assert scheme.read(dict(zip(scheme.suffixes(), made, strict=True)))[0].constants_key() == scheme.constants_key()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "tensor"},
        {"granularity": "tensor", "activation_scheme": "none"},
        {"granularity": "tensor", "activation_scheme": "static", "activation_scales": {"0": 0.05}},
        {"weight_block_size": [128, 128]},
        {"method": "int8"},
    ],
    ids=repr,
)
def test_a_report_says_whether_a_sample_depends_on_the_others_of_its_batch(options: dict[str, Any]) -> None:
    """Whoever draws for many must draw it alone then."""
    made = nn.Sequential(nn.Linear(128, 128)).bfloat16()
    run = torch.compile(made, backend="fp8_diffusion", options={**OPTIONS, **options})
    batch = torch.randn(2, 32, 128, dtype=torch.bfloat16)
    louder = batch * torch.tensor([1, 37]).view(2, 1, 1)
    same = torch.equal(run(batch)[0], run(louder)[0])
    (row,) = fp8_compile.report(made).layers
    assert row.decision == "quantized"
    assert row.mixes_samples == (options == {"granularity": "tensor"})
    assert same != row.mixes_samples


@EACH
@pytest.mark.parametrize("m", [1, 2, 7, 8, 4096])
def test_every_way_to_run_gives_the_linear(scheme: Scheme, m: int) -> None:
    weight, x = torch.randn(32, 64, dtype=torch.bfloat16), torch.randn(m, 64, dtype=torch.bfloat16)
    bias = torch.randn(32, dtype=torch.bfloat16)
    for call in scheme.for_call(m, CPU):
        if call.linear is None:
            assert call.reason
            continue
        activation = x if call.quantize is None else call.quantize(x)
        out = call.linear(activation, *scheme.quantize_weight(weight), bias, torch.bfloat16)
        assert sqnr(nn.functional.linear(x, weight, bias), out) > 24


def test_how_fp8_runs() -> None:
    assert Fp8().for_call(8, CPU) == (ROWWISE, ROWWISE_UNFUSED_SCALES)
    assert Fp8("tensor").for_call(8, CPU) == (TENSORWISE,)
    assert Fp8().for_call(7, CPU) == Fp8("tensor").for_call(7, CPU) == (WEIGHT_ONLY,)
    assert Fp8(min_m=7).for_call(7, CPU)[0] == ROWWISE
    for size, scheme in zip(BLOCK_SIZES, BLOCKWISE, strict=True):
        assert scheme.for_call(8, CPU) == (BLOCKS[size], DEQUANTIZED_BLOCKS)
        assert scheme.for_call(7, CPU) == (WEIGHT_ONLY_BLOCKS,)
        assert scheme.label == BLOCKS[size].name
    (kept,) = Fp8(small_m="keep").for_call(7, CPU)
    assert (kept.linear, kept.reason) == (None, "M is below min_m 8")
    (unknown,) = Fp8().for_call(float("inf"), CPU)
    assert (unknown.linear, unknown.reason) == (None, "number of rows is known only at run time")
    assert NONE.for_call(1, CPU) == NONE.for_call(16, CPU) == (WEIGHT_ONLY,)
    assert NONE.for_call(17, CPU) == NONE.for_call(float("inf"), CPU) == (DEQUANTIZED,)
    assert NONE.constants_key() == Fp8().constants_key()
    assert ROWWISE.quantize is numerics.quantize_rowwise
    assert TENSORWISE.quantize is numerics.quantize_tensorwise


@pytest.mark.parametrize("scheme", [Fp8(), Fp8("tensor"), NONE, *(Fp8(weight_block_size=size) for size in BLOCK_SIZES)])
def test_a_gpu_without_fp8_cores_keeps_the_weights_in_fp8_only(scheme: Fp8, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of the graph may touch a tensor of E4M3 but to view it in another type, which launches no kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    weight, x = torch.randn(32, 256).bfloat16(), torch.randn(24, 256).bfloat16()
    for m in (1, 24, float("inf")):
        (how,) = scheme.for_call(m, torch.device("cuda"))
        assert (how.name, how.quantize) == ("fp8-weight-only", None)
        assert "no FP8 cores" in how.reason
        assert "method='int8'" in how.reason
        constants = scheme.quantize_weight(weight)
        for rows in (x, x[:1]):
            out = how.linear(rows, *constants[:2], None, torch.bfloat16)
            assert sqnr(rows.float() @ scheme.dequantize(constants, torch.float32).T, out) > 40
    touched = [
        node
        for node in make_fx(lambda *args: how.linear(x, *args, None, torch.bfloat16))(*constants).graph.nodes
        if node.op == "call_function" and any(_is_fp8(value) for value in node.all_input_nodes)
    ]
    assert [node.target for node in touched] == [torch.ops.aten.view.dtype]


def _is_fp8(node: Any) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.float8_e4m3fn


@dataclass(frozen=True)
class OneScale(Doubled):
    """A constant whose first dimension is not N: rows depend on each other."""

    method: ClassVar[str] = "one-scale"

    block: tuple[int, ...] = (1, 1)

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return {"qdata": Spec((out_features, in_features), torch.bfloat16), "scale": Spec((1, 1), torch.bfloat16)}

    def quantize_weight(self, weight: Tensor) -> tuple[Tensor, ...]:
        amax = weight.abs().amax().view(1, 1).to(torch.bfloat16)
        return (weight / amax).to(torch.bfloat16), amax

    def dequantize(self, constants: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return (constants[0] * constants[1]).to(dtype)


def test_rows_that_depend_on_each_other_are_not_quantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheme_module, "CHUNK_ON_CPU", 7 * 64)
    weight = torch.randn(48, 64)
    weight[40] *= 30
    for whole, part in zip(OneScale().quantize_weight(weight), OneScale().quantize_in_chunks(weight), strict=True):
        assert torch.equal(whole, part)


def test_nan_is_found_in_constants_of_any_floating_type() -> None:
    weight = torch.randn(48, 64)
    assert finite(OneScale().quantize_weight(weight))
    weight[3, 5] = torch.nan
    assert not finite(OneScale().quantize_weight(weight))


def test_lists_from_files_become_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no tuples, and a scheme is hashed."""
    monkeypatch.setattr(schemes, "_METHODS", dict(schemes._METHODS))
    register_method(OneScale)
    assert hash(scheme_named("one-scale", {"block": [2, 3]})) == hash(OneScale(block=(2, 3)))


# --- the table of methods ---


def test_a_registered_method_is_an_option(doubled: None) -> None:
    assert schemes.methods() == ["doubled", "fp8", "int8"]
    assert scheme_for(parse_options({**METHOD, "factor": 3})) == Doubled(3)
    with pytest.raises(UnknownMethodError, match=r"did you mean 'doubled'.*valid: doubled, fp8, int8.*register_method"):
        parse_options({"method": "double"})
    with pytest.raises(OptionError, match="factor=0: expected an integer of at least 1"):
        parse_options({**METHOD, "factor": 0})


def test_an_option_of_another_method_says_whose_it_is(doubled: None) -> None:
    with pytest.raises(OptionError, match="granularity belongs to method 'fp8', not to 'doubled'"):
        parse_options({**METHOD, "granularity": "tensor"})
    with pytest.raises(OptionError, match="factor belongs to method 'doubled', not to 'fp8'"):
        parse_options({"factor": 3, "method": "fp8"})
    with pytest.raises(OptionError, match="factor belongs to method 'doubled', which must be given with it"):
        parse_options({"factor": 3})


def test_a_name_can_be_registered_once(doubled: None) -> None:
    @dataclass(frozen=True)
    class Other(Doubled):
        method: ClassVar[str] = "doubled"

    register_method(Doubled)  # the same again changes nothing
    with pytest.raises(OptionError, match="method 'doubled' is registered already; registered: doubled, fp8, int8"):
        register_method(Other)
    assert schemes.method_named("doubled") is Doubled


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs a package that names methods by these entry points."""

    def install(points: str) -> None:
        info = tmp_path / "other_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fp8_compile.methods]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path)
        schemes._entry_points.cache_clear()

    yield install
    monkeypatch.undo()
    schemes._entry_points.cache_clear()


def test_a_method_of_another_package(installed: Callable[[str], None]) -> None:
    """Nothing of it is imported by hand, and a broken one is in nobody's way."""
    place = "tests.support.methods:Doubled"
    installed(f"doubled = {place}\nbroken = no_such_module:Scheme\nother = {place}")
    assert scheme_for(parse_options(METHOD)) == Doubled()
    assert scheme_for(parse_options({})) == Fp8()
    with pytest.raises(OptionError, match="granularity belongs to method 'fp8', not to 'doubled'"):
        parse_options({**METHOD, "granularity": "row"})
    with pytest.raises(
        UnknownMethodError, match=r"method='broken', no_such_module:Scheme, cannot be imported: No module"
    ):
        parse_options({"method": "broken"})
    with pytest.raises(OptionError, match="Doubled is registered as 'other', and its own name is 'doubled'"):
        parse_options({"method": "other"})


def test_a_method_of_another_package_with_a_name_of_ours(installed: Callable[[str], None]) -> None:
    installed("fp8 = tests.support.methods:Doubled")
    with pytest.raises(OptionError, match=r"method 'fp8' of tests\.support\.methods:Doubled has the name of a method"):
        schemes.methods()


class Undecorated(Doubled):
    method: ClassVar[str] = "undecorated"
    more: int = 3


class Unnamed(Doubled):
    pass


@dataclass(frozen=True)
class Hiding(Doubled):
    method: ClassVar[str] = "hiding"

    def specs(self, out_features: int, in_features: int) -> dict[str, Spec]:
        return {"grad": Spec((out_features, in_features), torch.float16)}


@dataclass(frozen=True)
class Suffixed(Doubled):
    method: ClassVar[str] = "suffixed"

    def suffixes(self) -> tuple[str, ...]:
        return ("_packed", "_scale")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Doubled(), "expected a subclass of"),
        (Undecorated, "Undecorated: expected a frozen dataclass"),
        (Unnamed, "Unnamed has no class attribute `method`"),
        (Hiding, "a constant called 'grad' would hide an attribute"),
        (Suffixed, r"the first of suffixes\(\) must be ''"),
    ],
)
def test_what_is_no_method_is_refused_when_it_is_registered(kind: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        register_method(kind)


# --- a registered method through every entrance ---


def is_doubled(m: nn.Module) -> bool:
    return all(isinstance(p, QuantizedWeight) and p.scheme == Doubled(3) for p in m.parameters() if p.dim() == 2)


def runs_doubled(m: Any, x: Tensor, **options: Any) -> bool:
    """Whether ``m``, compiled with ``options``, runs the registered method's own functions."""
    ours.used.clear()
    torch.compiler.reset()
    m._compiled_call_impl = None
    expected = m(x)
    m.compile(backend="fp8_diffusion", fullgraph=True, options={"inner_backend": "eager", **options})
    close = sqnr(expected, m(x)) > 35
    return close and len(ours.used) > 2 and {r.scheme for r in fp8_compile.report(m).layers} == {HOW.name}


def test_compiled_alone(doubled: None) -> None:
    assert runs_doubled(model(), tokens(), **{**OPTIONS, **METHOD, "factor": 3, "inner_backend": "eager"})


def test_converted_at_load_time_and_whatever_follows(doubled: None, tmp_path: Path) -> None:
    """The weights carry their scheme: no option has to say it again."""
    m, x = model(), tokens()
    fp8_compile.quantize_(m, {**LOAD, **METHOD, "factor": 3})
    assert is_doubled(m)
    assert runs_doubled(m, x)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert is_doubled(other)
        assert runs_doubled(other, x)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    other = model()
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    fp8_compile.save_fp8_checkpoint(m, tmp_path / "m.safetensors")
    read = model()
    fp8_compile.load_fp8_checkpoint(read, tmp_path / "m.safetensors")
    for made in (other, read):
        assert is_doubled(made)
        assert runs_doubled(made, x)


def test_options_that_differ_from_the_weights(doubled: None) -> None:
    m, x = model(1), tokens()
    fp8_compile.quantize_(m, {**LOAD, **METHOD, "factor": 3})
    for options, message in (
        ({"method": "fp8"}, "method='fp8': the weights were quantized with method='doubled'"),
        ({**METHOD, "factor": 2}, "factor=2: the weights were quantized with factor=3"),
        ({**METHOD, "factor": 0}, "factor=0: expected an integer"),
        ({"granularity": "row"}, "granularity belongs to method 'fp8', and the weights were quantized with 'doubled'"),
    ):
        m.compile(backend="fp8_diffusion", options={"inner_backend": "eager", **options})
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
            m(x)
    assert runs_doubled(m, x, **METHOD, factor=3)


def test_through_diffusers(doubled: None, tmp_path: Path) -> None:
    import diffusers

    kind: Any = diffusers.QwenImageTransformer2DModel
    from bench.tiny import build_transformer

    build_transformer().bfloat16().save_pretrained(tmp_path / "bf16")
    config = fp8_compile.Fp8DiffusionConfig(**METHOD, factor=3, ignored_layers=["txt_mlp"])
    m = kind.from_pretrained(tmp_path / "bf16", torch_dtype=torch.bfloat16, quantization_config=config)
    quantized = {n: p for n, p in m.named_parameters() if isinstance(p, QuantizedWeight)}
    assert len(quantized) > 10
    assert {p.scheme for p in quantized.values()} == {Doubled(3)}
    m.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    read = {n: p for n, p in again.named_parameters() if isinstance(p, QuantizedWeight)}
    assert read.keys() == quantized.keys()
    for name, parameter in read.items():
        assert parameter.scheme == Doubled(3)
        assert torch.equal(parameter.dequantize(), quantized[name].dequantize())


def test_plain_tensors_that_look_like_constants_stay_what_they_are(doubled: None, tmp_path: Path) -> None:
    """The file says which weights are quantized, so nothing has to be guessed by names and dtypes."""
    import diffusers

    kind: Any = diffusers.QwenImageTransformer2DModel
    from bench.tiny import build_transformer

    m = build_transformer().to(torch.float16)  # as the values of the method are
    fp8_compile.quantize_(m, METHOD)
    m.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved", torch_dtype=torch.float16)
    for (name, a), (_, b) in zip(m.named_parameters(), again.named_parameters(), strict=True):
        assert isinstance(a, QuantizedWeight) == isinstance(b, QuantizedWeight), name
        assert torch.equal(a + 0, b + 0), name


def test_plain_values_of_a_dtype_that_a_method_uses_are_converted_as_they_arrive(doubled: None, tmp_path: Path) -> None:
    import diffusers

    from bench.tiny import build_transformer

    m: Any = build_transformer().to(torch.float16)  # as the values of the method are
    m.save_pretrained(tmp_path / "saved")
    fp8_compile.quantize_(m, METHOD)
    kind: Any = diffusers.QwenImageTransformer2DModel
    config = fp8_compile.Fp8DiffusionConfig(**METHOD)
    again = kind.from_pretrained(tmp_path / "saved", torch_dtype=torch.float16, quantization_config=config)
    for (name, a), (_, b) in zip(m.named_parameters(), again.named_parameters(), strict=True):
        assert isinstance(a, QuantizedWeight) == isinstance(b, QuantizedWeight), name
        assert torch.equal(a + 0, b + 0), name


def test_damaged_metadata_is_an_error_of_the_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: t.contiguous() for name, t in model(1).state_dict().items()}
    for text in ("garbage", '[{"method": "fp8"}]', "3"):
        save_file(tensors, tmp_path / "m.safetensors", metadata={"fp8_compile": text})
        with pytest.raises(fp8_compile.CheckpointError, match=r"m\.safetensors: metadata 'fp8_compile' is damaged"):
            fp8_compile.load_fp8_checkpoint(model(1), tmp_path / "m.safetensors")


def test_a_file_whose_method_is_not_registered(doubled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(1)
    fp8_compile.quantize_(m, {**LOAD, **METHOD})
    fp8_compile.save_fp8_checkpoint(m, tmp_path / "m.safetensors")
    pickled = pickle.dumps(m)
    monkeypatch.delitem(schemes._METHODS, "doubled")
    for read in (
        lambda: fp8_compile.load_fp8_checkpoint(model(1), tmp_path / "m.safetensors"),
        lambda: pickle.loads(pickled),
    ):
        with pytest.raises(UnknownMethodError, match=r"method='doubled' is not valid.*importing the module that calls"):
            read()


def test_nan_and_inf_are_found_in_its_constants(doubled: None) -> None:
    for convert in (
        lambda m: fp8_compile.quantize_(m, {**LOAD, **METHOD}),
        lambda m: torch.compile(m, backend="fp8_diffusion", options={**OPTIONS, **METHOD})(tokens()),
    ):
        m = model(1)
        m.blocks[0].to_q.weight[3, 5] = float("nan")
        with pytest.raises(fp8_compile.NonFiniteWeightError, match="to_q"):
            convert(m)


def test_files_name_weights_by_their_public_place() -> None:
    """A move of a module inside the package leaves the files that ``torch.save`` wrote readable."""
    weight = QuantizedWeight.quantize(torch.randn(WIDTH, WIDTH), Fp8())
    assert b"fp8_compile\nrebuild_quantized_weight" in pickle.dumps(weight, protocol=2)
    assert b"weights.quantized_weight" not in pickle.dumps(weight, protocol=2)
    assert QuantizedWeight.__module__ == "fp8_compile"
