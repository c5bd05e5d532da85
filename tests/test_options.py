from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fp8_compile import Fp8Error, Fp8Options, OptionError, PatternError
from fp8_compile.checks import check_agreement, parse_options
from fp8_compile.schemes import scheme_for
from fp8_compile.schemes.few_rows import SMALL_M
from fp8_compile.schemes.fp8 import GRANULARITIES, Fp8


def test_defaults() -> None:
    assert dataclasses.asdict(Fp8Options()) == {
        "method": None,
        "method_options": {},
        "ignored_layers": (),
        "layers": {},
        "activation_scales": {},
        "uncalibrated": "error",
        "min_features": 256,
        "cpu_attention": "as-written",
        "attention": "as-written",
        "strict": False,
        "inner_backend": "inductor",
        "mode": None,
        "disabled_passes": (),
        "dump_graphs": None,
        "inductor": {},
    }
    assert dataclasses.asdict(scheme_for(Fp8Options())) == {
        "granularity": "row",
        "activation_scheme": "dynamic",
        "weight_block_size": None,
        "min_m": 8,
        "small_m": "weight-only",
        "input_scale": None,
    }


def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    return gm.forward


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "fp8"),
        ("ignored_layers", ("img_mlp", "re:^blocks", "to_qkv")),
        ("min_features", 1),
        ("min_features", 4096),
        ("cpu_attention", "float32"),
        ("attention", "fp8"),
        ("attention", "fp8-emulated"),
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
    assert getattr(parse_options({name: value}), name) == value
    assert parse_options(Fp8Options(**{name: value})) == Fp8Options(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_scheme", "dynamic"),
        ("activation_scheme", "none"),
        ("weight_block_size", None),
        ("weight_block_size", (128, 128)),
        ("weight_block_size", (1, 128)),
        *(("granularity", value) for value in GRANULARITIES),
        *(("small_m", value) for value in SMALL_M),
        ("min_m", 1),
    ],
)
def test_valid_options_of_the_method(name: str, value: Any) -> None:
    options = parse_options({name: value})
    assert options == Fp8Options(method_options={name: value})
    assert getattr(scheme_for(options), name) == value


@pytest.mark.parametrize("value", [["a", "b"], ("a", "b"), iter(["a", "b"])])
def test_ignored_layers_becomes_a_tuple(value: Any) -> None:
    assert Fp8Options(ignored_layers=value).ignored_layers == ("a", "b")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("method", "fp9", "method='fp9' is not valid, did you mean 'fp8'?; valid: fp8"),
        ("method", "int4", "method='int4' is not valid, did you mean 'int8'?; valid: fp8, int8"),
        ("method", "awq", "method='awq' is not valid; valid: fp8, int8"),
        ("method", 8, "method=8: expected a name"),
        ("method", ["fp8"], "method=['fp8']: expected a name"),
        ("granularity", "rows", "granularity='rows' is not valid, did you mean 'row'?; valid: row, tensor"),
        ("granularity", "block", "granularity='block' is not valid; valid: row, tensor"),
        ("granularity", None, "granularity=None is not valid; valid: row, tensor"),
        ("activation_scheme", "dynamc", "activation_scheme='dynamc' is not valid, did you mean 'dynamic'?"),
        ("activation_scheme", None, "activation_scheme=None is not valid"),
        *(
            ("weight_block_size", value, f"weight_block_size={value!r} is not valid; valid: [128, 128], [1, 128], None")
            for value in ([64, 64], [128, 1], [128], 0, 128, "128x128", True)
        ),
        *(
            (name, value, f"{name}={value!r}: expected an integer of at least 1")
            for name in ("min_features", "min_m")
            for value in (0, -1, 1.5, 256.0, "256", None, True)
        ),
        *(("strict", value, f"strict={value!r}: expected True or False") for value in (1, 0, "yes", None)),
        *(
            ("dump_graphs", value, f"dump_graphs={value!r}: expected the path of a directory, or None")
            for value in (True, 3, b"/tmp")
        ),
        ("dump_graphs", __file__, f"dump_graphs={__file__!r} is a file; expected the path of a directory"),
        ("small_m", "fp8", "small_m='fp8' is not valid; valid: weight-only, keep"),
        ("disabled_passes", "real_rotary", "disabled_passes='real_rotary': expected a list of names"),
        ("disabled_passes", ["real_rotry"], "disabled_passes='real_rotry' is not valid, did you mean 'real_rotary'?"),
        (
            "disabled_passes",
            ["quantize_linears"],
            "valid: real_rotary, rotary_pairs, float32_attention, sigmoid_gelu, e4m3_on_cpu, one_fp8_copy, whole_rows",
        ),
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
    def of_an_instance() -> Fp8Options:
        own = name in {f.name for f in dataclasses.fields(Fp8)}
        return parse_options(Fp8Options(**({"method_options": {name: value}} if own else {name: value})))

    for make in (of_an_instance, lambda: parse_options({name: value})):
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
    for make in (lambda: Fp8Options(ignored_layers=value), lambda: parse_options({"ignored_layers": value})):
        with pytest.raises(PatternError, match=r"expected a list of patterns, for example \['img_mlp'\]") as error:
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
        parse_options({key: True})
    assert str(error.value).startswith(f"unknown option {key!r}, did you mean {near!r}?; the options are method, ")
    assert str(error.value).endswith("every setting of torch._inductor.config")


@pytest.mark.parametrize("key", ["zzzzzz", 3, None])
def test_unknown_key_with_nothing_close(key: Any) -> None:
    with pytest.raises(OptionError) as error:
        parse_options({key: 1})
    assert f"unknown option {key!r}; the options are method" in str(error.value)


def test_unknown_key_is_unknown_whatever_the_inner_backend() -> None:
    with pytest.raises(OptionError, match="unknown option 'ignored_layer', did you mean 'ignored_layers'"):
        parse_options({"ignored_layer": ["img_mlp"], "inner_backend": "eager"})


def test_settings_of_inductor_stand_beside_the_others() -> None:
    options = parse_options(
        {"max_autotune": True, "ignored_layers": ["img_mlp"], "triton.cudagraphs": False, "realize_reads_threshold": 8}
    )
    assert options.ignored_layers == ("img_mlp",)
    assert options.inductor == {"max_autotune": True, "triton.cudagraphs": False, "realize_reads_threshold": 8}


def test_settings_of_inductor_may_stand_in_both_places() -> None:
    options = parse_options({"inductor": {"max_autotune": True}, "epilogue_fusion": False})
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
    for make in (lambda: parse_options({key: value}), lambda: Fp8Options(inductor={key: value})):
        with pytest.raises(OptionError) as error:
            make()
        assert str(error.value) == f"{key}={value!r}: this setting of Inductor takes {expected}"


def test_settings_of_inductor_in_no_dict_beside_others() -> None:
    with pytest.raises(OptionError, match="inductor=None: expected a dict"):
        parse_options({"inductor": None, "max_autotune": True})


def test_callable_settings_of_inductor() -> None:
    passes = {"post_grad_custom_post_pass": inner}
    assert parse_options(passes).inductor == passes


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
        parse_options({**given, "inner_backend": inner_backend})
    assert str(error.value).startswith(f"{name}=")
    assert repr(inner_backend) in str(error.value)


def test_options_of_the_issue() -> None:
    options = parse_options(
        {"method": "fp8", "ignored_layers": ["img_mlp"], "activation_scheme": "dynamic", "weight_block_size": None}
    )
    assert options == Fp8Options(
        method="fp8",
        method_options={"activation_scheme": "dynamic", "weight_block_size": None},
        ignored_layers=("img_mlp",),
    )


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_blocks_have_no_granularity(granularity: str) -> None:
    """Neither what was given nor that it is the default makes it right."""
    with pytest.raises(OptionError) as error:
        parse_options({"weight_block_size": [128, 128], "granularity": granularity})
    assert str(error.value) == (
        f"granularity={granularity!r} and weight_block_size=[128, 128] exclude each other: blocks have scales of their "
        "own; leave one of the two out"
    )
    assert scheme_for(parse_options({"weight_block_size": None, "granularity": granularity})) == Fp8(granularity)


def test_blocks_in_a_list_or_a_tuple_are_the_same() -> None:
    for size in ([1, 128], (1, 128)):
        assert Fp8(weight_block_size=size) == scheme_for(parse_options({"weight_block_size": size}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"granularity": "row"}, "granularity='row' and weight_block_size=[128, 128] exclude each other"),
        ({"weight_block_size": [1, 128]}, "weight_block_size=(1, 128): the weights were quantized with"),
        ({"weight_block_size": None}, "weight_block_size=None: the weights were quantized with"),
    ],
)
def test_options_that_differ_from_weights_in_blocks(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        check_agreement(parse_options(given), Fp8(weight_block_size=(128, 128)))
    assert str(error.value).startswith(message)
    check_agreement(parse_options({"weight_block_size": [128, 128], "min_m": 3}), Fp8(weight_block_size=(128, 128)))


@pytest.mark.parametrize("options", [None, {}, Fp8Options()])
def test_nothing_given_is_the_defaults(options: Any) -> None:
    assert parse_options(options) == Fp8Options()


def test_instance_stays_the_same() -> None:
    options = Fp8Options(ignored_layers=("a",), inductor={"max_autotune": True}, method_options={"min_m": 3})
    assert parse_options(options) == options


def test_what_was_changed_makes_the_same_options() -> None:
    assert Fp8Options().changed() == {}
    options = Fp8Options(ignored_layers=("a",), inductor={"max_autotune": True}, method_options={"min_m": 3})
    assert options.changed() == {"ignored_layers": ("a",), "inductor": {"max_autotune": True}, "min_m": 3}
    assert parse_options(options.changed()) == options


def test_mode_of_torch_compile() -> None:
    assert parse_options(None, "max-autotune").mode == "max-autotune"
    assert parse_options({"min_m": 3}, "max-autotune") == Fp8Options(method_options={"min_m": 3}, mode="max-autotune")
    assert parse_options(Fp8Options(method_options={"min_m": 3}), "max-autotune") == Fp8Options(
        method_options={"min_m": 3}, mode="max-autotune"
    )
    assert parse_options({"mode": "max-autotune"}, "max-autotune").mode == "max-autotune"


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, Fp8Options(mode="reduce-overhead")])
def test_mode_given_twice(options: Any) -> None:
    with pytest.raises(OptionError) as error:
        parse_options(options, "max-autotune")
    assert str(error.value) == "mode is given twice: 'max-autotune' and, in the options, 'reduce-overhead'"


@pytest.mark.parametrize("options", ["ignored_layers", ["ignored_layers"], 3, True])
def test_options_of_another_type(options: Any) -> None:
    with pytest.raises(OptionError, match="expected a dict or Fp8Options"):
        parse_options(options)


def test_given_dict_is_not_touched() -> None:
    given = {"inductor": {"max_autotune": True}, "epilogue_fusion": False, "ignored_layers": ["a"]}
    parse_options(given, "default")
    assert given == {"inductor": {"max_autotune": True}, "epilogue_fusion": False, "ignored_layers": ["a"]}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Fp8Options)])
def test_frozen(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Fp8Options(), name, None)


def test_errors_are_of_this_package_and_value_errors() -> None:
    assert issubclass(OptionError, Fp8Error)
    assert issubclass(OptionError, ValueError)


@pytest.mark.parametrize("name", ["method_options", "inductor"])
def test_an_option_given_in_two_places(name: str) -> None:
    key, value = ("granularity", "row") if name == "method_options" else ("max_autotune", True)
    with pytest.raises(OptionError, match=f"{key} is given twice: {value!r} and, in {name}, {value!r}"):
        parse_options({name: {key: value}, key: value})
