from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sqnr import sqnr
from torch import Tensor, nn

from fp8_compile import Fp8Error, Fp8Options, OptionError, PatternError, Scheme, numerics, register_method
from fp8_compile.options import GRANULARITIES
from fp8_compile.schemes import fp8


def test_defaults() -> None:
    assert dataclasses.asdict(Fp8Options()) == {
        "method": "fp8",
        "ignored_layers": (),
        "activation_scheme": "dynamic",
        "weight_block_size": None,
        "granularity": "row",
        "min_features": 256,
        "min_rows": 8,
        "few_rows": "weight-only",
        "strict": False,
        "inner_backend": "inductor",
        "mode": None,
        "disabled_passes": (),
        "dump_graphs": None,
        "inductor": {},
    }


def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    return gm.forward


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "fp8"),
        ("ignored_layers", ("img_mlp", "re:^blocks", "to_qkv")),
        ("activation_scheme", "dynamic"),
        ("weight_block_size", None),
        *(("granularity", value) for value in GRANULARITIES),
        ("min_features", 1),
        ("min_features", 4096),
        ("min_rows", 1),
        ("strict", True),
        ("inner_backend", "inductor"),
        ("inner_backend", "eager"),
        ("inner_backend", "aot_eager"),
        ("inner_backend", "cudagraphs"),
        ("inner_backend", inner),
        *(("mode", mode) for mode in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")),
        ("dump_graphs", "/tmp/graphs"),
        ("inductor", {"max_autotune": True}),
    ],
)
def test_valid(name: str, value: Any) -> None:
    assert getattr(Fp8Options(**{name: value}), name) == value
    assert getattr(Fp8Options.parse({name: value}), name) == value
    assert Fp8Options.parse(Fp8Options(**{name: value})) == Fp8Options(**{name: value})


@pytest.mark.parametrize("value", [["a", "b"], ("a", "b"), iter(["a", "b"])])
def test_ignored_layers_becomes_a_tuple(value: Any) -> None:
    assert Fp8Options(ignored_layers=value).ignored_layers == ("a", "b")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("method", "fp9", "method='fp9' is not valid, did you mean 'fp8'?; valid: fp8"),
        ("method", "int4", "method='int4' is not valid; valid: fp8"),
        ("method", None, "method=None is not valid; valid: fp8"),
        ("method", ["fp8"], "method=['fp8'] is not valid"),
        ("granularity", "rows", "granularity='rows' is not valid, did you mean 'row'?; valid: row, tensor"),
        ("granularity", "block", "granularity='block' is not valid; valid: row, tensor"),
        ("granularity", None, "granularity=None is not valid; valid: row, tensor"),
        ("activation_scheme", "static", "activation_scheme='static' is not available yet; use 'dynamic'"),
        ("activation_scheme", "dynamc", "activation_scheme='dynamc' is not valid, did you mean 'dynamic'?"),
        ("activation_scheme", None, "activation_scheme=None is not valid"),
        (
            "weight_block_size",
            (128, 128),
            "weight_block_size=(128, 128): block-wise scales are not available yet; use None",
        ),
        ("weight_block_size", [128, 128], "weight_block_size=[128, 128]: block-wise scales are not available yet"),
        ("weight_block_size", 0, "weight_block_size=0: block-wise scales are not available yet"),
        *(
            (name, value, f"{name}={value!r}: an integer of at least 1 belongs here")
            for name in ("min_features", "min_rows")
            for value in (0, -1, 1.5, 256.0, "256", None, True)
        ),
        *(("strict", value, f"strict={value!r}: True or False belongs here") for value in (1, 0, "yes", None)),
        *(
            ("dump_graphs", value, f"dump_graphs={value!r}: the path of a directory or None belongs here")
            for value in (True, 3, b"/tmp")
        ),
        ("dump_graphs", __file__, f"dump_graphs={__file__!r} is a file; the path of a directory belongs here"),
        ("few_rows", "fp8", "few_rows='fp8' is not valid; valid: weight-only, keep"),
        ("disabled_passes", "real_rotary", "disabled_passes='real_rotary': a list of names belongs here"),
        ("disabled_passes", ["real_rotry"], "disabled_passes='real_rotry' is not valid, did you mean 'real_rotary'?"),
        ("disabled_passes", ["quantize_linears"], "valid: real_rotary, one_fp8_copy, whole_rows"),
        ("mode", "max-autotun", "mode='max-autotun' is not valid, did you mean 'max-autotune'?; valid: default, "),
        ("mode", "fast", "mode='fast' is not valid; valid: default, "),
        ("mode", 3, "mode=3 is not valid"),
        ("mode", "", "mode='' is not valid"),
        ("inner_backend", "indctor", "inner_backend='indctor' is not valid, did you mean 'inductor'?; valid: "),
        ("inner_backend", "aot_eage", "inner_backend='aot_eage' is not valid, did you mean 'aot_eager'?; valid: "),
        ("inner_backend", None, "inner_backend=None is not valid; valid: "),
        ("inner_backend", "fp8_diffusion", "inner_backend='fp8_diffusion' is not valid"),
        ("inductor", "max_autotune", "inductor='max_autotune'"),
        ("inductor", ["max_autotune"], "inductor=['max_autotune']"),
        ("inductor", {"max_autotun": True}, "unknown option 'max_autotun', did you mean 'max_autotune'?"),
    ],
)
def test_invalid(name: str, value: Any, message: str) -> None:
    for make in (lambda: Fp8Options(**{name: value}), lambda: Fp8Options.parse({name: value})):
        with pytest.raises(OptionError) as error:
            make()
        assert message in str(error.value)


def test_backend_does_not_offer_itself() -> None:
    with pytest.raises(OptionError) as error:
        Fp8Options(inner_backend="none such")
    valid = str(error.value).split("valid: ")[1].split(", ")
    assert {"inductor", "eager", "aot_eager"} <= set(valid)
    assert "fp8_diffusion" not in valid
    assert len(valid) == len(set(valid))


@pytest.mark.parametrize("value", ["img_mlp", None, 3, True, {"img_mlp": False}])
def test_ignored_layers_is_a_list(value: Any) -> None:
    """A bare string would otherwise be a list of letters, and a dict one of names whatever their values say."""
    for make in (lambda: Fp8Options(ignored_layers=value), lambda: Fp8Options.parse({"ignored_layers": value})):
        with pytest.raises(PatternError, match=r"a list of patterns belongs here, for example \['img_mlp'\]") as error:
            make()
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [[""], ["img_mlp", "re:("], [None], [["img_mlp"]]])
def test_entries_of_ignored_layers_are_checked(value: Any) -> None:
    with pytest.raises(PatternError):
        Fp8Options(ignored_layers=value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("ignored_layer", "ignored_layers"),
        ("ignore_layers", "ignored_layers"),
        ("activation_schem", "activation_scheme"),
        ("granularty", "granularity"),
        ("min_feature", "min_features"),
        ("innner_backend", "inner_backend"),
        ("max_autotun", "max_autotune"),
        ("triton.cudagraph", "triton.cudagraphs"),
    ],
)
def test_unknown_key_names_the_closest(key: str, near: str) -> None:
    with pytest.raises(OptionError) as error:
        Fp8Options.parse({key: True})
    assert str(error.value).startswith(f"unknown option {key!r}, did you mean {near!r}?; the options are method, ")
    assert str(error.value).endswith("every setting of torch._inductor.config")


@pytest.mark.parametrize("key", ["zzzzzz", 3, None])
def test_unknown_key_with_nothing_close(key: Any) -> None:
    with pytest.raises(OptionError) as error:
        Fp8Options.parse({key: 1})
    assert f"unknown option {key!r}; the options are method" in str(error.value)


def test_unknown_key_is_unknown_whatever_the_inner_backend() -> None:
    with pytest.raises(OptionError, match="unknown option 'ignored_layer', did you mean 'ignored_layers'"):
        Fp8Options.parse({"ignored_layer": ["img_mlp"], "inner_backend": "eager"})


def test_settings_of_inductor_stand_beside_the_others() -> None:
    options = Fp8Options.parse(
        {"max_autotune": True, "ignored_layers": ["img_mlp"], "triton.cudagraphs": False, "realize_reads_threshold": 8}
    )
    assert options.ignored_layers == ("img_mlp",)
    assert options.inductor == {"max_autotune": True, "triton.cudagraphs": False, "realize_reads_threshold": 8}


def test_settings_of_inductor_may_stand_in_both_places() -> None:
    options = Fp8Options.parse({"inductor": {"max_autotune": True}, "epilogue_fusion": False})
    assert options.inductor == {"max_autotune": True, "epilogue_fusion": False}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_autotune", "yes", "bool"),
        ("max_autotune", 1, "bool"),
        ("realize_reads_threshold", "4", "int"),
        ("realize_reads_threshold", 4.0, "int"),
        ("triton.cudagraphs", None, "bool"),
    ],
)
def test_settings_of_inductor_are_type_checked(key: str, value: Any, expected: str) -> None:
    for make in (lambda: Fp8Options.parse({key: value}), lambda: Fp8Options(inductor={key: value})):
        with pytest.raises(OptionError) as error:
            make()
        assert str(error.value) == f"{key}={value!r}: this setting of Inductor takes {expected}"


def test_settings_of_inductor_in_no_dict_beside_others() -> None:
    with pytest.raises(OptionError, match="inductor=None: a dict of settings belongs here"):
        Fp8Options.parse({"inductor": None, "max_autotune": True})


def test_callable_settings_of_inductor() -> None:
    passes = {"post_grad_custom_post_pass": inner}
    assert Fp8Options.parse(passes).inductor == passes


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager", inner])
@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"mode": "max-autotune"}, "mode"),
        ({"inductor": {"max_autotune": True}}, "inductor"),
        ({"max_autotune": True}, "inductor"),
    ],
)
def test_settings_of_inductor_need_inductor(inner_backend: Any, given: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError, match="is a setting of Inductor, and inner_backend is") as error:
        Fp8Options.parse({**given, "inner_backend": inner_backend})
    assert str(error.value).startswith(f"{name}=")
    assert repr(inner_backend) in str(error.value)


def test_options_of_the_issue() -> None:
    options = Fp8Options.parse(
        {"method": "fp8", "ignored_layers": ["img_mlp"], "activation_scheme": "dynamic", "weight_block_size": None}
    )
    assert options == Fp8Options(ignored_layers=("img_mlp",))


@pytest.mark.parametrize("options", [None, {}, Fp8Options()])
def test_nothing_given_is_the_defaults(options: Any) -> None:
    assert Fp8Options.parse(options) == Fp8Options()


def test_instance_stays_the_same() -> None:
    options = Fp8Options(ignored_layers=("a",), inductor={"max_autotune": True}, min_rows=3)
    assert Fp8Options.parse(options) == options


def test_what_was_changed_makes_the_same_options() -> None:
    assert Fp8Options().changed() == {}
    options = Fp8Options(ignored_layers=("a",), inductor={"max_autotune": True}, min_rows=3)
    assert options.changed() == {"ignored_layers": ("a",), "inductor": {"max_autotune": True}, "min_rows": 3}
    assert Fp8Options.parse(options.changed()) == options


def test_mode_of_torch_compile() -> None:
    assert Fp8Options.parse(None, "max-autotune").mode == "max-autotune"
    assert Fp8Options.parse({"min_rows": 3}, "max-autotune") == Fp8Options(min_rows=3, mode="max-autotune")
    assert Fp8Options.parse(Fp8Options(min_rows=3), "max-autotune") == Fp8Options(min_rows=3, mode="max-autotune")
    assert Fp8Options.parse({"mode": "max-autotune"}, "max-autotune").mode == "max-autotune"


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, Fp8Options(mode="reduce-overhead")])
def test_mode_given_twice(options: Any) -> None:
    with pytest.raises(OptionError) as error:
        Fp8Options.parse(options, "max-autotune")
    assert str(error.value) == "mode is given twice: 'max-autotune' and, in the options, 'reduce-overhead'"


@pytest.mark.parametrize("options", ["ignored_layers", ["ignored_layers"], 3, True])
def test_options_of_another_type(options: Any) -> None:
    with pytest.raises(OptionError, match="a dict or Fp8Options belongs here"):
        Fp8Options.parse(options)


def test_given_dict_is_not_touched() -> None:
    given = {"inductor": {"max_autotune": True}, "epilogue_fusion": False, "ignored_layers": ["a"]}
    Fp8Options.parse(given, "default")
    assert given == {"inductor": {"max_autotune": True}, "epilogue_fusion": False, "ignored_layers": ["a"]}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Fp8Options)])
def test_frozen(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Fp8Options(), name, None)


def test_errors_are_of_this_package_and_value_errors() -> None:
    assert issubclass(OptionError, Fp8Error)
    assert issubclass(OptionError, ValueError)


@pytest.fixture
def methods() -> Iterator[None]:
    before = dict(fp8._METHODS)
    yield
    fp8._METHODS.clear()
    fp8._METHODS.update(before)


used: list[str] = []


def half_quantize(x: Tensor) -> Tensor:
    used.append("quantize")
    return x / 2


def half_quantize_weight(weight: Tensor) -> tuple[Tensor]:
    return (weight * 2,)


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return nn.functional.linear(x, weight, bias).to(dtype)


def _half(options: Fp8Options) -> Scheme:
    if options.granularity != "tensor":
        raise OptionError("method 'half' has no granularity 'row'")

    def refuses(in_features: int, out_features: int, dtype: torch.dtype) -> str | None:
        return "too square" if in_features == out_features else None

    return Scheme("half", half_quantize_weight, half_quantize, half_linear, ("weight",), refuses)


def test_registered_method_is_an_option(methods: None) -> None:
    register_method("half", _half)
    assert fp8.methods() == ["fp8", "half"]
    options = Fp8Options(method="half", granularity="tensor")
    assert fp8.scheme_for(options).name == "half"
    with pytest.raises(OptionError, match=r"did you mean 'half'.*valid: fp8, half"):
        Fp8Options(method="hal")


@pytest.mark.parametrize("name", ["fp8", "half"])
def test_registered_name_is_taken(name: str, methods: None) -> None:
    register_method("half", _half)
    factory = fp8._METHODS[name]
    with pytest.raises(OptionError, match=f"method '{name}' is registered already; registered: fp8, half"):
        register_method(name, lambda options: fp8.ROW)
    assert fp8._METHODS[name] is factory


def test_registered_method_compiles(methods: None) -> None:
    """Its own constants, its own functions, its own refusals."""
    register_method("half", _half)
    used.clear()
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).bfloat16()
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    given = {"method": "half", "granularity": "tensor", "inner_backend": keep, "min_features": 1, "min_rows": 1}
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        result = torch.compile(model, backend="fp8_diffusion", options=given)(x)
        assert sqnr(model(x), result) > 45
    assert used == ["quantize"]
    (gm,) = graphs
    functions = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert functions == [nn.functional.linear, half_quantize, half_linear]


def test_error_of_a_registered_method_reaches_the_user(methods: None) -> None:
    register_method("half", _half)
    model = nn.Linear(64, 32).bfloat16()
    compiled = torch.compile(model, backend="fp8_diffusion", options={"method": "half", "inner_backend": "eager"})
    with torch.no_grad(), pytest.raises(Exception, match="method 'half' has no granularity 'row'") as error:
        compiled(torch.randn(8, 64, dtype=torch.bfloat16))
    assert isinstance(error.value.inner_exception, OptionError)


def test_schemes_of_the_granularities() -> None:
    row = fp8.scheme_for(Fp8Options())
    tensor = fp8.scheme_for(Fp8Options(granularity="tensor"))
    assert (row.name, row.quantize) == ("fp8-row", numerics.quantize_rowwise)
    assert (tensor.name, tensor.quantize) == ("fp8-tensor", numerics.quantize_tensorwise)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scheme", [fp8.ROW, fp8.TENSOR], ids=["row", "tensor"])
def test_constants_are_those_of_the_weight_in_its_usual_layout(scheme: Scheme, transposed: bool) -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    made = scheme.make_constants(nn.Parameter(weight.t() if transposed else weight), transposed)
    assert len(made) == len(scheme.constants) == 2
    for constant, expected in zip(made, scheme.quantize(weight), strict=True):
        assert not constant.requires_grad
        assert constant.is_contiguous()
        torch.testing.assert_close(constant.float(), expected.float(), rtol=0, atol=0)
