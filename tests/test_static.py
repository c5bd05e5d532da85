"""Static activations: one scale for each layer, known before; no reduction is left in the graph."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fp8_compile
from fp8_compile import numerics
from fp8_compile.errors import CheckpointError, OptionError
from fp8_compile.schemes import MOST_ROWS, scheme_named
from fp8_compile.schemes.fp8 import Fp8
from fp8_compile.weights.quantized_weight import QuantizedWeight
from tests.support.blocks import LOAD, OPTIONS, Model, model, tokens
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

# Quicker to compile: what the rewritten graph computes is what counts here.
EAGER = {"inner_backend": "eager"}


def amax_of_inputs(made: nn.Module, x: Tensor) -> dict[str, float]:
    """What a calibration gives: the amax of each linear's input, over 448."""
    found: dict[str, float] = {}

    def watch(name: str, args: tuple[Tensor, ...]) -> None:
        found[name] = max(found.get(name, 0.0), float(args[0].abs().amax()) / 448)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: watch(name, args))
        for name, module in made.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        made(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture
def calibrated() -> tuple[Model, Tensor, dict[str, float]]:
    torch.manual_seed(0)
    made, x = model(), tokens()
    return made, x, amax_of_inputs(made, x)


def static(scales: dict[str, float], **options: Any) -> dict[str, Any]:
    return {"activation_scheme": "static", "activation_scales": scales, **options}


@torch.no_grad()
def test_blocks_share_a_graph_and_each_has_its_own_scales(
    calibrated: tuple[Model, Tensor, dict[str, float]],
) -> None:
    made, x, scales = calibrated
    expected = made(x)
    graphs: list[Any] = []

    def inner(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm

    out = copy.deepcopy(made).compile_blocks(**static(scales), inner_backend=inner)(x)
    assert len(graphs) == 1
    assert sqnr(expected, out) > 30
    # Were the first block's scales those of all, a scale that is much larger in the last one would change nothing.
    other = {name: scale * (64 if name.startswith("blocks.2.") else 1) for name, scale in scales.items()}
    assert not torch.equal(copy.deepcopy(made).compile_blocks(**EAGER, **static(other))(x), out)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_compiled_load_time_and_files_agree_to_the_bit(
    granularity: str, calibrated: tuple[Model, Tensor, dict[str, float]], tmp_path: Path
) -> None:
    made, x, scales = calibrated
    options = static(scales, granularity=granularity)
    expected = copy.deepcopy(made).compile_whole(**EAGER, **options)(x)
    assert torch.equal(copy.deepcopy(made).compile_blocks(**EAGER, **options)(x), expected)

    loaded = copy.deepcopy(made)
    fp8_compile.quantize_(loaded, {**LOAD, **options})
    file = tmp_path / "model.safetensors"
    fp8_compile.save_fp8_checkpoint(loaded, file)
    assert torch.equal(copy.deepcopy(loaded).compile_whole(**EAGER)(x), expected)
    assert torch.equal(loaded.compile_blocks(**EAGER)(x), expected)

    names = load_file(file).keys()
    assert "blocks.0.to_q.input_scale" in names
    assert not [name for name in names if "folded" in name]
    again = model()
    fp8_compile.load_fp8_checkpoint(again, file)
    assert torch.equal(again.compile_whole(**EAGER)(x), expected)
    report = str(fp8_compile.report(again))
    assert f"fp8-{granularity}-static" in report


@torch.no_grad()
def test_input_scales_of_other_files_are_used_or_dropped_by_request(
    calibrated: tuple[Model, Tensor, dict[str, float]], tmp_path: Path
) -> None:
    made, x, scales = calibrated
    loaded = copy.deepcopy(made)
    fp8_compile.quantize_(loaded, {**LOAD, **static(scales, granularity="tensor")})
    own = tmp_path / "own.safetensors"
    fp8_compile.save_fp8_checkpoint(loaded, own)
    expected = loaded.compile_whole(**EAGER)(x)

    dynamic = copy.deepcopy(made).compile_whole(**EAGER, granularity="tensor")(x)
    for leaf, scale in (("input_scale", "weight_scale"), ("scale_input", "scale_weight")):
        tensors = {
            name.replace("input_scale", leaf).replace("weight_scale", scale): tensor.reshape(-1)
            if name.endswith("_scale")
            else tensor
            for name, tensor in load_file(own).items()
        }
        file = tmp_path / f"{leaf}.safetensors"
        save_file(tensors, file)
        used, dropped = model(), model()
        fp8_compile.load_fp8_checkpoint(used, file)
        assert torch.equal(used.compile_whole(**EAGER)(x), expected)
        fp8_compile.load_fp8_checkpoint(dropped, file, input_scales=False)
        assert torch.equal(dropped.compile_whole(**EAGER)(x), dynamic)
    fp8_compile.load_fp8_checkpoint(dropped := model(), own, input_scales=False)
    assert torch.equal(dropped.compile_whole(**EAGER)(x), dynamic)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_file_with_a_bad_input_scale(
    value: float, calibrated: tuple[Model, Tensor, dict[str, float]], tmp_path: Path
) -> None:
    made, _, scales = calibrated
    fp8_compile.quantize_(made, {**LOAD, **static(scales)})
    file = tmp_path / "model.safetensors"
    fp8_compile.save_fp8_checkpoint(made, file)
    tensors = load_file(file)
    tensors["blocks.1.to_k.input_scale"] = torch.tensor(value)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"tensor 'blocks.1.to_k.input_scale' is an input scale that is NaN"):
        fp8_compile.load_fp8_checkpoint(model(), file)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e39, 1e-60, "1", True])
def test_bad_scales(value: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(f"activation_scales: 'to_q'={value!r}: expected a positive")):
        fp8_compile.Fp8Options(activation_scales={"to_q": value})
    with pytest.raises(OptionError, match=re.escape(f"input_scale={value!r}: expected a positive")):
        Fp8(activation_scheme="static", input_scale=value)


@torch.no_grad()
def test_layers_that_were_not_calibrated(calibrated: tuple[Model, Tensor, dict[str, float]]) -> None:
    made, x, scales = calibrated
    some = {name: scale for name, scale in scales.items() if not name.startswith("blocks.1.img_mlp")}
    message = "no input scale for blocks.1.img_mlp.0, blocks.1.img_mlp.2"
    with pytest.raises(OptionError, match=message):
        fp8_compile.quantize_(copy.deepcopy(made), {**LOAD, **static(some)})
    with pytest.raises(Exception, match=message):
        copy.deepcopy(made).compile_whole(**EAGER, **static(some))(x)
    with pytest.raises(Exception, match=message):  # the graph was made for the first block
        copy.deepcopy(made).compile_blocks(**EAGER, **static(some))(x)

    options = static(some, uncalibrated="dynamic")
    whole = copy.deepcopy(made)
    expected = whole.compile_whole(**EAGER, **options)(x)
    schemes = {row.path: row.scheme for row in fp8_compile.report(whole).layers}
    assert schemes["blocks.1.img_mlp.0"] == "fp8-row"
    assert schemes["blocks.1.to_q"] == schemes["blocks.0.img_mlp.0"] == "fp8-row-static"
    assert torch.equal(copy.deepcopy(made).compile_blocks(**EAGER, **options)(x), expected)
    fp8_compile.quantize_(made, {**LOAD, **options})
    assert torch.equal(made.compile_whole(**EAGER)(x), expected)


@torch.no_grad()
def test_two_layers_that_read_one_activation_must_have_one_scale(
    calibrated: tuple[Model, Tensor, dict[str, float]],
) -> None:
    made, x, scales = calibrated
    assert scales["blocks.1.to_q"] == scales["blocks.1.to_k"]
    # In the first block that is compiled, they get quantizations of their own.
    first = {**scales, **{f"blocks.{i}.to_q": 2 * scales[f"blocks.{i}.to_q"] for i in range(3)}}
    out = copy.deepcopy(made).compile_blocks(**EAGER, **static(first))(x)
    assert sqnr(made(x), out) > 30
    later = {**scales, "blocks.1.to_q": 2 * scales["blocks.1.to_q"]}
    with pytest.raises(OptionError, match=r"blocks\.1\.to_(q|k) and blocks\.1\.to_(q|k) read one activation"):
        copy.deepcopy(made).compile_blocks(**EAGER, **static(later))(x)


@torch.no_grad()
def test_a_weight_that_is_written_into_keeps_its_input_scale(
    calibrated: tuple[Model, Tensor, dict[str, float]],
) -> None:
    made, _, scales = calibrated
    fp8_compile.quantize_(made, {**LOAD, **static(scales)})
    weight: Any = made.blocks[0].to_q.weight
    before, scale = weight.input_scale.clone(), weight.scale.clone()
    weight.data += torch.ones_like(weight.dequantize())
    assert torch.equal(weight.input_scale, before)
    assert not torch.equal(weight.scale, scale)
    assert torch.equal(weight.folded_scale, weight.scale * weight.input_scale)
    moved = copy.deepcopy(made).to(torch.float16).blocks[0].to_q.weight
    assert torch.equal(moved.input_scale, before)


@torch.no_grad()
def test_another_calibration_makes_other_constants(calibrated: tuple[Model, Tensor, dict[str, float]]) -> None:
    made, x, scales = calibrated
    first = made.compile_whole(**EAGER, **static(scales))(x)
    coarse = {name: 50 * scale for name, scale in scales.items()}
    second = made.compile_whole(**EAGER, **static(coarse))(x)
    fresh = copy.deepcopy(made).compile_whole(**EAGER, **static(coarse))(x)
    assert torch.equal(second, fresh)
    assert not torch.equal(second, first)


@pytest.mark.parametrize("cast_saturates", [True, False])
def test_static_values_saturate_and_what_is_not_finite_stays_so(
    cast_saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cast_saturates and not numerics._cast_saturates():
        pytest.skip("this torch's cast to E4M3 makes NaN of what is too large")
    monkeypatch.setattr(numerics, "_cast_saturates", lambda: cast_saturates)
    scale, ones = torch.tensor(0.5), torch.ones(8, 1)
    x = torch.tensor([[1.0, 224.0, 1000.0, -1e30, float("inf"), -float("inf"), float("nan"), 0.0]])
    values, given = numerics.quantize_static_rowwise(x, scale, ones)
    assert given.tolist() == [[1.0]]
    seen = values.float()[0]
    assert seen[:4].tolist() == [2.0, 448.0, 448.0, -448.0]
    assert seen[4:7].isnan().all()
    assert seen[7] == 0
    assert torch.equal(numerics.quantize_static_tensorwise(x, scale)[0].view(torch.uint8), values.view(torch.uint8))
    largest = torch.tensor([[torch.finfo(torch.bfloat16).max]], dtype=torch.bfloat16)
    tiny = torch.tensor(torch.finfo(torch.float32).tiny)
    assert numerics.quantize_static_tensorwise(largest, tiny)[0].float().item() == 448


@pytest.mark.inductor
@torch.no_grad()
def test_inductor_keeps_what_is_not_finite() -> None:
    """A compiler that took ``x * 0.0`` for zero would make numbers of infinities."""
    m = nn.Linear(64, 64).bfloat16()
    x = torch.randn(1, 16, 64, dtype=torch.bfloat16)
    x[0, 1, 3], x[0, 2, 3], x[0, 3, 3], x[0, 4, 3] = torch.nan, torch.inf, -torch.inf, 1e30
    options = {"min_features": 64, "activation_scheme": "static", "input_scale": 0.01}
    outs = []
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        outs.append(torch.compile(m, backend="fp8_diffusion", options={**options, "inner_backend": inner})(x)[0])
    for out in outs:
        assert out[1:4].isnan().all()
        assert out[4:].isfinite().all()
    assert torch.equal(*(out.nan_to_num() for out in outs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_floors(granularity: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(512, 256, dtype=dtype)
    gaussian = torch.randn(64, 512, dtype=dtype)
    heavy = torch.distributions.StudentT(4.0).sample((64, 512)).to(dtype)
    rows = torch.cat([gaussian[:32], torch.zeros(32, 512, dtype=dtype)])
    outliers = gaussian.clone()
    outliers[:, ::128] *= 64
    for x, floor in ((gaussian, 28), (heavy, 24), (rows, 28), (outliers, 28)):
        scheme = Fp8(granularity, "static", input_scale=float(x.abs().amax()) / 448)
        constants = scheme.quantize_weight(linear.weight.detach())
        call = scheme.for_call(64, torch.device("cpu"))[0]
        named = {**dict(zip(scheme.specs(256, 512), constants, strict=True)), "ones": torch.ones(64, 1)}
        assert call.quantize is not None
        assert call.linear is not None
        with torch.no_grad():
            q = call.quantize(x, *(named[name] for name in call.takes))
            out = call.linear(q, *call.operands_of(named), linear.bias, dtype)
            assert sqnr(linear(x).float(), out.float()) > floor


def test_static_and_dynamic_weights_are_not_exchanged(calibrated: tuple[Model, Tensor, dict[str, float]]) -> None:
    made, x, scales = calibrated
    loaded = copy.deepcopy(made)
    fp8_compile.quantize_(loaded, {**LOAD, **static(scales)})
    with pytest.raises(Exception, match="activation_scheme='dynamic': the weights were quantized with"):
        loaded.compile_whole(**EAGER, activation_scheme="dynamic")(x)
    fp8_compile.quantize_(made, LOAD)
    with pytest.raises(Exception, match="activation_scheme='static': the weights were quantized with"):
        made.compile_whole(**EAGER, **static(scales))(x)


def test_combinations_that_make_no_sense() -> None:
    for options, message in (
        ({"activation_scheme": "static", "weight_block_size": [128, 128]}, "exclude each other"),
        ({"input_scale": 0.1}, r"input_scale=0.1 is of use with activation_scheme='static' only"),
        ({"activation_scales": 0.1}, "expected a dict of scales by the path of the layer"),
        ({"uncalibrated": "skip"}, "uncalibrated='skip' is not valid; valid: error, dynamic"),
    ):
        with pytest.raises(OptionError, match=message):
            fp8_compile.quantize_(nn.Linear(256, 256), options)


def test_a_pickle_keeps_the_scale(tmp_path: Path) -> None:
    weight = QuantizedWeight.quantize(
        torch.randn(256, 256, dtype=torch.bfloat16),
        scheme_named("fp8", {"activation_scheme": "static", "input_scale": 0.25}),
    )
    torch.save(weight, tmp_path / "weight.pt")
    again = torch.load(tmp_path / "weight.pt")
    assert again.scheme.input_scale == 0.25
    assert all(map(torch.equal, again.constants[1:], weight.constants[1:]))


def test_ones_are_enough_for_a_video() -> None:
    # HunyuanVideo, 129 frames of 720 x 1280: 33 latent frames of 90 x 160, in patches of 1 x 2 x 2; and a batch of 2.
    assert MOST_ROWS > 2 * 33 * 45 * 80


@torch.no_grad()
def test_through_diffusers_own_loading_and_saving(tmp_path: Path) -> None:
    """With a plan of other schemes beside it. Scales are in the weights' file, and not in the configuration."""
    tiny = MODELS["QwenImage"]
    made: Any = tiny.build()
    with fp8_compile.calibrate(made, progress=False) as calibration:
        made(**tiny.inputs(0))
    made.save_pretrained(tmp_path / "bf16")
    plan = {"txt_mlp": {"method": "int8"}, "img_mod": {"activation_scheme": "none"}}
    config = fp8_compile.Fp8DiffusionConfig(**static(calibration.scales(made), min_features=64, layers=plan))
    kind = diffusers.QwenImageTransformer2DModel
    loaded = kind.from_pretrained(tmp_path / "bf16", quantization_config=config, torch_dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "fp8", max_shard_size="200KB")
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    assert "activation_scales" not in (tmp_path / "fp8/config.json").read_text()
    again = kind.from_pretrained(tmp_path / "fp8", torch_dtype=torch.bfloat16)
    outputs, schemes = [], []
    for m in (loaded, again):
        m.compile(backend="fp8_diffusion", options={"inner_backend": "aot_eager"})
        outputs.append(m(**tiny.inputs(0))[0])
        schemes.append({row.path: row.scheme for row in fp8_compile.report(m).layers})
        assert fp8_compile.report(m).unmatched_patterns == ()
    assert torch.equal(*outputs)
    assert schemes[0] == schemes[1]
    found = schemes[0]
    assert found["transformer_blocks.1.txt_mlp.net.2"] == "int8-row"
    assert found["transformer_blocks.1.img_mod.1"] == "fp8-weight-only"
    assert found["transformer_blocks.1.attn.to_q"] == "fp8-row-static"
    assert "amax of QwenImageTransformer2DModel, 48 layers in 1 steps" in str(fp8_compile.report(loaded))


# --- found by a reviewer ---


@torch.no_grad()
def test_no_layer_gets_the_scale_of_another_by_the_end_of_its_path(
    calibrated: tuple[Model, Tensor, dict[str, float]],
) -> None:
    made, x, scales = calibrated
    some = {**scales, "to_q": 100.0, "": 100.0}
    del some["blocks.1.to_q"]
    with pytest.raises(OptionError, match=r"no input scale for blocks\.1\.to_q;"):
        fp8_compile.quantize_(copy.deepcopy(made), {**LOAD, **static(some)})
    whole = copy.deepcopy(made).compile_whole(**EAGER, **static(some, uncalibrated="dynamic"))
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="activation_scales: '', 'to_q' name no layer of this"):
        whole(x)
    assert {row.path: row.scheme for row in fp8_compile.report(whole).layers}["blocks.1.to_q"] == "fp8-row"


@torch.no_grad()
def test_a_dict_of_options_that_was_changed_is_refused(calibrated: tuple[Model, Tensor, dict[str, float]]) -> None:
    made, x, scales = calibrated
    options = {**OPTIONS, **static(scales)}
    first, second = copy.deepcopy(made), copy.deepcopy(made)
    first.compile(backend="fp8_diffusion", options=options)
    before = first(x)
    options["activation_scales"] = {name: 50 * scale for name, scale in scales.items()}
    second.compile(backend="fp8_diffusion", options=options)
    with pytest.raises(OptionError, match="the dict of options was changed after a graph was compiled with it"):
        second(x)
    assert torch.equal(first(x), before)


@torch.no_grad()
def test_scales_that_are_not_used_are_refused(calibrated: tuple[Model, Tensor, dict[str, float]]) -> None:
    made, x, scales = calibrated
    for options in ({"activation_scales": scales}, {"uncalibrated": "dynamic"}):
        with pytest.raises(OptionError, match=f"{next(iter(options))} is of use with activation_scheme='static'"):
            fp8_compile.quantize_(made, {**LOAD, **options})
    with pytest.raises(OptionError, match="activation_scales is of use with activation_scheme='static', where input"):
        fp8_compile.quantize_(made, {**LOAD, **static(scales, input_scale=0.5)})
    fp8_compile.quantize_(made, {**LOAD, **static(scales)})
    other = {name: 2 * scale for name, scale in scales.items()}
    with pytest.raises(Exception, match=r"activation_scales: the weight of blocks.0.to_. was quantized with another"):
        copy.deepcopy(made).compile_whole(**EAGER, **static(other))(x)
    made.compile_whole(**EAGER, **static(scales))(x)


@torch.no_grad()
def test_what_a_model_was_quantized_with_may_be_said_again(
    calibrated: tuple[Model, Tensor, dict[str, float]],
) -> None:
    made, x, scales = calibrated
    some = {name: scale for name, scale in scales.items() if not name.startswith("blocks.1.")}
    options = static(some, uncalibrated="dynamic")
    fp8_compile.quantize_(made, {**LOAD, **options})
    expected = copy.deepcopy(made).compile_blocks(**EAGER)(x)
    assert torch.equal(made.compile_whole(**EAGER, **options)(x), expected)
    assert {row.path: row.scheme for row in fp8_compile.report(made).layers}["blocks.1.to_q"] == "fp8-row"


def test_a_state_dict_brings_its_input_scales(calibrated: tuple[Model, Tensor, dict[str, float]]) -> None:
    made, _, scales = calibrated
    other = copy.deepcopy(made)
    fp8_compile.quantize_(made, {**LOAD, **static(scales)})
    fp8_compile.quantize_(other, {**LOAD, **static({name: 4 * scale for name, scale in scales.items()})})
    made.load_state_dict(other.state_dict())
    weights: list[Any] = [m.blocks[1].to_q.weight for m in (made, other)]
    assert weights[0].scheme.input_scale == weights[1].scheme.input_scale
    assert all(map(torch.equal, weights[0].constants[1:], weights[1].constants[1:]))


def test_a_static_weight_without_a_scale_is_refused_in_words() -> None:
    with pytest.raises(OptionError, match="activation_scheme='static' needs an input_scale"):
        QuantizedWeight.quantize(torch.randn(64, 64).bfloat16(), Fp8(activation_scheme="static"))


@torch.no_grad()
def test_the_device_is_not_asked_of_layers_without_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where each call is tried first."""
    asked: list[Any] = []
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr("fp8_compile.backend.refusal", lambda *given: asked.append(given))
    with pytest.raises(Exception, match=r"no input scale for blocks\.0\.to_q"):
        model(1).compile_whole(**EAGER, activation_scheme="static")(tokens())
    assert asked == []


@torch.no_grad()
@pytest.mark.parametrize("given", ["nothing", "dynamic", "static", "other", "int8"])
def test_static_files_of_others_through_from_pretrained(given: str, tmp_path: Path) -> None:
    tiny = MODELS["QwenImage"]
    made: Any = tiny.build()
    made.save_pretrained(tmp_path / "theirs")
    fp8_compile.quantize_(made, {"min_features": 64, "activation_scheme": "static", "input_scale": 0.02})
    (file,) = (tmp_path / "theirs").glob("*.safetensors")
    fp8_compile.save_fp8_checkpoint(made, file, format="compressed-tensors")
    options: dict[str, Any] = {
        "nothing": {},
        "dynamic": {"activation_scheme": "dynamic"},
        "static": {"activation_scheme": "static"},
        "other": static({"img_in": 0.5}, uncalibrated="dynamic"),
        "int8": {"layers": {"to_q": {"method": "int8"}}},
    }[given]
    config = fp8_compile.Fp8DiffusionConfig(**options, min_features=64)

    def load() -> Any:
        return diffusers.QwenImageTransformer2DModel.from_pretrained(
            tmp_path / "theirs", quantization_config=config, torch_dtype=torch.bfloat16
        )

    if given == "int8":
        with pytest.raises(OptionError, match="method='int8': the weights were quantized with method='fp8'"):
            load()
        return
    weight = load().transformer_blocks[0].attn.to_q.weight
    assert weight.scheme.static == (given != "dynamic")
    assert weight.scheme.input_scale == (None if given == "dynamic" else pytest.approx(0.02))


@torch.no_grad()
def test_a_static_model_with_a_linear_left_in_bf16_is_read_back(tmp_path: Path) -> None:
    tiny = MODELS["QwenImage"]
    made: Any = tiny.build()
    fp8_compile.quantize_(made, {"min_features": 64, "activation_scheme": "static", "input_scale": 0.02})
    made.proj_out = nn.Linear(made.proj_out.in_features, made.proj_out.out_features).bfloat16()
    made.save_pretrained(tmp_path)
    again = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.transformer_blocks[0].attn.to_q.weight.scheme.static
    assert not isinstance(again.proj_out.weight, QuantizedWeight)
