"""FP8 checkpoints of other tools: small files made to their layouts, read as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fp8_compile
from fp8_compile import QuantizedWeight, numerics
from fp8_compile.schemes.fp8 import Fp8
from tests.support.blocks import Model, model, tokens
from tests.support.sqnr import sqnr

FILE = "model.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compressed_tensors(state: Tensors) -> Tensors:
    """One scale per output channel, ``[N, 1]``, in bfloat16 as llm-compressor writes them."""
    return _fp8(state, "weight_scale", lambda w: w.float().abs().amax(1, keepdim=True).bfloat16() / 448)


def modelopt(state: Tensors) -> Tensors:
    """One scale in all, and one for the activation."""
    made = _fp8(state, "weight_scale", lambda w: w.float().abs().amax() / 448)
    return {**made, **{n.replace("weight_scale", "input_scale"): torch.tensor(0.01) for n in made if "_scale" in n}}


def comfyui(state: Tensors) -> Tensors:
    """One scale in all, as a vector; a mark for the file."""
    made = _fp8(state, "scale_weight", lambda w: (w.float().abs().amax() / 448).reshape(1))
    return {**made, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


def deepseek(state: Tensors, height: int = 128) -> Tensors:
    """One scale for each block, in bfloat16 as in Qwen3's files; and one for the activation, which others have."""
    made = {}
    for name, value in state.items():
        if value.dim() == 2 and "to_k" not in name:
            n, k = (-size % block for size, block in zip(value.shape, (height, 128), strict=True))
            blocks = (
                torch.nn.functional.pad(value.float(), (0, k, 0, n)).unflatten(1, (-1, 128)).unflatten(0, (-1, height))
            )
            scale = (blocks.abs().amax((1, 3)) / 448).bfloat16()
            wide = scale.float().repeat_interleave(height, 0).repeat_interleave(128, 1)
            values = value.float() / wide[: value.shape[0], : value.shape[1]]
            made[name] = values.clamp(-448, 448).to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = scale
            made[name.replace("weight", "activation_scale")] = torch.tensor(0.01)
        else:
            made[name] = value
    return made


def _fp8(state: Tensors, leaf: str, scale_of: Callable[[Tensor], Tensor]) -> Tensors:
    made: Tensors = {}
    for name, value in state.items():
        if value.dim() == 2 and "to_k" not in name:
            scale = scale_of(value)
            made[name] = (value.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            made[name.replace("weight", leaf)] = scale
        else:
            made[name] = value
    return made


SCHEMES = {compressed_tensors: "fp8-row", modelopt: "fp8-tensor-static", comfyui: "fp8-tensor"}


@pytest.mark.parametrize("layout", [compressed_tensors, modelopt, comfyui])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_the_bytes_of_others_are_used_as_they_are(
    layout: Callable[[Tensors], Tensors], where: str, tmp_path: Path
) -> None:
    state = model(2).state_dict()
    tensors = layout(state)
    save_file(tensors, tmp_path / FILE)
    with torch.device(where):
        m = Model(2).bfloat16()
    fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE)
    leaf = "scale_weight" if layout is comfyui else "weight_scale"
    for name, parameter in m.named_parameters():
        if tensors[name].dtype != torch.float8_e4m3fn:
            assert torch.equal(parameter, tensors[name])
            continue
        assert isinstance(parameter, QuantizedWeight)
        assert torch.equal(parameter.qdata.view(torch.uint8), tensors[name].view(torch.uint8))
        assert torch.equal(parameter.scale.flatten(), tensors[name.replace("weight", leaf)].float().flatten())
        expected = numerics.dequantize(parameter.qdata, tensors[name.replace("weight", leaf)].float(), torch.bfloat16)
        assert torch.equal(parameter.dequantize(), expected)
    x = tokens()
    expected = m(x)
    m.compile_whole(min_features=8)
    assert sqnr(expected, m(x)) > 24
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert rows["blocks.0.to_q"].scheme == SCHEMES[layout]
    assert rows["blocks.0.to_k"].reason == "not in FP8 in the checkpoint"


@pytest.mark.parametrize("height", [128, 1])
def test_a_scale_for_each_block_is_read(height: int, tmp_path: Path) -> None:
    def build() -> Any:
        linears = torch.nn.Linear(400, 272), torch.nn.GELU(), torch.nn.Linear(272, 400)
        return torch.nn.Sequential(*linears).bfloat16().eval()

    original = build()
    tensors = deepseek(original.state_dict(), height)
    save_file(tensors, tmp_path / FILE)
    with pytest.warns(fp8_compile.UnusedScaleWarning, match=r"0.activation_scale and 1 more"):
        fp8_compile.load_fp8_checkpoint(m := build(), tmp_path / FILE)
    for name in ("0.weight", "2.weight"):
        weight = m.get_parameter(name)
        assert weight.scheme == Fp8(weight_block_size=(height, 128))
        assert torch.equal(weight.qdata.view(torch.uint8), tensors[name].view(torch.uint8))
        assert torch.equal(weight.scale, tensors[f"{name}_scale_inv"].float())
        assert sqnr(original.get_parameter(name), weight.dequantize()) > 29  # the scale's bfloat16 costs some
    x = torch.randn(1, 16, 400, dtype=torch.bfloat16)
    expected = m(x)
    compiled = torch.compile(m, backend="fp8_diffusion", fullgraph=True, options={"inner_backend": "aot_eager"})
    assert sqnr(expected, compiled(x)) > 28
    assert {row.scheme for row in fp8_compile.report(m).layers} == {f"fp8-{height}x128"}
    fp8_compile.save_fp8_checkpoint(m, tmp_path / "ours.safetensors")
    fp8_compile.load_fp8_checkpoint(again := build(), tmp_path / "ours.safetensors")
    assert again.get_parameter("0.weight").scheme == m.get_parameter("0.weight").scheme
    assert torch.equal(again.get_parameter("0.weight").scale, m.get_parameter("0.weight").scale)


def test_a_single_block_is_one_scale_in_all(tmp_path: Path) -> None:
    tensors = deepseek(model(1).state_dict())
    save_file(tensors, tmp_path / FILE)
    with pytest.warns(fp8_compile.UnusedScaleWarning, match=r"img_mlp\.0\.activation_scale and 1 more"):
        fp8_compile.load_fp8_checkpoint(m := model(1), tmp_path / FILE)
    assert m.get_parameter(NAME).scheme == Fp8("tensor", "static")
    assert m.get_parameter("blocks.0.img_mlp.0.weight").scheme == Fp8(weight_block_size=(128, 128))


def test_blocks_of_another_size_are_refused_with_those_that_can_be_read(tmp_path: Path) -> None:
    tensors = deepseek(model(1).state_dict())
    name = "blocks.0.img_mlp.0.weight_scale_inv"
    save_file({**tensors, name: torch.ones(4, 1)}, tmp_path / FILE)
    with pytest.raises(fp8_compile.CheckpointError, match="blocks") as error:
        fp8_compile.load_fp8_checkpoint(model(1), tmp_path / FILE)
    assert str(error.value).endswith(
        "has shape [4, 1]; a scale for values of shape [256, 64] has one element, [256, 1], or [2, 1] for blocks of "
        "[128, 128], or [256, 1] for blocks of [1, 128]"
    )
    assert error.value.tensor == name


def test_names_may_differ_and_a_directory_may_hold_several_files(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{n}": t for n, t in comfyui(model(2).state_dict()).items() if n != "scaled_fp8"}
    names = sorted(tensors)
    for i, part in enumerate((names[:5], names[5:])):
        save_file({n: tensors[n] for n in part}, tmp_path / f"part-{i}.safetensors")
    m = model(2)
    fp8_compile.load_fp8_checkpoint(m, tmp_path, rename=lambda n: n.removeprefix("model.diffusion_model."))
    assert sum(isinstance(p, QuantizedWeight) for p in m.parameters()) == 6


def test_saved_and_loaded_bit_by_bit(tmp_path: Path) -> None:
    m, other = model(2), model(2)
    fp8_compile.quantize_(m, {"min_features": 64, "ignored_layers": ["to_k"]})
    fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    assert load_file(tmp_path / FILE)["blocks.0.to_q.weight"].dtype == torch.float8_e4m3fn
    fp8_compile.load_fp8_checkpoint(other, tmp_path / FILE)
    x = tokens()
    assert torch.equal(m(x), other(x))
    assert {n: type(p) for n, p in m.named_parameters()} == {n: type(p) for n, p in other.named_parameters()}


def entry(value: Any) -> Tensor:
    """What ComfyUI puts beside a weight: JSON in bytes."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_comfyui_says_the_format_of_each_weight_or_of_all(prefix: str, tmp_path: Path) -> None:
    tensors = _fp8(model(2).state_dict(), "weight_scale", lambda w: w.float().abs().amax() / 448)
    weights = [name for name in tensors if f"{name}_scale" in tensors]
    entries = {n.replace("weight", "comfy_quant"): entry({"format": "float8_e4m3fn"}) for n in weights}
    mark = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    layers = {f"{prefix}{n.removesuffix('.weight')}": {"format": "float8_e4m3fn"} for n in weights}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file({f"{prefix}{n}": t for n, t in {**tensors, **entries, **mark}.items()}, tmp_path / FILE, metadata)
    m = model(2)
    fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE)
    assert {n for n, p in m.named_parameters() if isinstance(p, QuantizedWeight)} == set(weights)
    assert torch.equal(m.get_parameter(NAME).scale, tensors[SCALE])


@pytest.mark.parametrize("metadata", ['{"layers": {"blocks.0.to_q": {"format": "mxfp8"}}}', '{"layers": 3}', "no JSON"])
def test_metadata_of_another_format_is_refused(metadata: str, tmp_path: Path) -> None:
    save_file(compressed_tensors(model(1).state_dict()), tmp_path / FILE, {"_quantization_metadata": metadata})
    with pytest.raises(fp8_compile.CheckpointError, match=r"_quantization_metadata.*(only float8_e4m3fn|is damaged)"):
        fp8_compile.load_fp8_checkpoint(model(1), tmp_path / FILE)


def test_rename_may_drop_a_tensor_and_what_is_unknown_is_an_error_that_says_so(tmp_path: Path) -> None:
    tensors = {**comfyui(model(2).state_dict()), "__index_timestep_zero__": torch.zeros(())}
    save_file(tensors, tmp_path / FILE)
    m = model(2)
    with pytest.raises(fp8_compile.CheckpointError, match=r"unknown to the model .rename may return None to drop it"):
        fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE)
    fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE, rename=lambda n: None if n.startswith("__") else n)
    assert sum(isinstance(p, QuantizedWeight) for p in m.parameters()) == 6


def test_a_module_may_have_a_parameter_that_is_called_like_a_scale(tmp_path: Path) -> None:
    def build() -> Model:
        m = model(1)
        m.blocks[0].to_k.scale_weight = torch.nn.Parameter(torch.full((3,), 2.0))
        return m

    fp8_compile.quantize_(m := build(), {"min_features": 64, "ignored_layers": ["to_k"]})
    fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    fp8_compile.load_fp8_checkpoint(other := build(), tmp_path / FILE)
    assert torch.equal(other.blocks[0].to_k.scale_weight, torch.full((3,), 2.0))


def test_values_beyond_float16_are_refused_where_the_weight_stands_for_float16(tmp_path: Path) -> None:
    tensors = compressed_tensors(model(1).state_dict())
    save_file({**tensors, SCALE: torch.tensor(1000.0)}, tmp_path / FILE)
    with pytest.raises(fp8_compile.CheckpointError, match="beyond the range of float16"):
        fp8_compile.load_fp8_checkpoint(model(1).half(), tmp_path / FILE)
    fp8_compile.load_fp8_checkpoint(model(1), tmp_path / FILE)


def test_the_largest_weight_is_written_and_read(tmp_path: Path) -> None:
    m = model(1)
    m.blocks[0].to_q.weight[0, 0] = torch.finfo(torch.bfloat16).max
    fp8_compile.quantize_(m, {"min_features": 64})
    fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    fp8_compile.load_fp8_checkpoint(other := model(1), tmp_path / FILE)
    assert torch.equal(other.get_parameter(NAME).scale, m.get_parameter(NAME).scale)


NAME = "blocks.0.to_q.weight"
SCALE = "blocks.0.to_q.weight_scale"


@pytest.mark.parametrize(
    ("edit", "tensor", "message"),
    [
        (lambda t: t.pop(SCALE), NAME, "FP8 values without a scale"),
        (lambda t: t.pop(NAME), SCALE, "a scale without FP8 values"),
        (lambda t: t.pop("blocks.1.to_k.bias"), "blocks.1.to_k.bias", "is missing"),
        (lambda t: t.update({"blocks.7.x": torch.ones(1)}), "blocks.7.x", "unknown to the model"),
        (lambda t: t.update({NAME: t[NAME][:32].clone()}), NAME, r"shape \[32, 64\]"),
        (lambda t: t.update({SCALE: torch.ones(7)}), SCALE, r"shape \[7\]"),
        (lambda t: t.update({SCALE: torch.full((64, 1), float("nan"))}), SCALE, "NaN"),
        (lambda t: t.update({SCALE: torch.zeros(())}), SCALE, "zero"),
        (lambda t: t.update({SCALE: torch.full((64, 1), float("inf"))}), SCALE, "infinite"),
        (lambda t: t.update({SCALE: torch.tensor(1e38)}), SCALE, "scale above .* infinite"),
        (lambda t: t[NAME].view(torch.uint8)[3, 5].fill_(0x7F), NAME, "holds NaN"),
        (lambda t: t[NAME].view(torch.uint8)[63, 63].fill_(0xFF), NAME, "holds NaN"),
        (lambda t: t.update({NAME: t[NAME].view(torch.int8)}), SCALE, "a scale without FP8 values: .* holds int8"),
        (lambda t: t.update({NAME: t[NAME].bfloat16()}), SCALE, "a scale without FP8 values: .* holds bfloat16"),
        (lambda t: t.update({NAME: t[NAME].to(torch.float8_e5m2)}), SCALE, "holds float8_e5m2"),
        (lambda t: t.update({"blocks.0.to_k.weight": t[NAME].to(torch.float8_e5m2)}), "blocks.0.to_k.weight", "e5m2"),
        (lambda t: t.update({"blocks.0.to_k.weight": t[NAME].to(torch.int32)}), "blocks.0.to_k.weight", "is int32"),
        (
            lambda t: t.update({"blocks.0.to_q.scale_weight": t[SCALE] * 2}),
            "blocks.0.to_q.weight_scale",
            "second scale",
        ),
        (
            lambda t: t.update({"blocks.0.to_q.comfy_quant": entry({"format": "nvfp4"})}),
            "blocks.0.to_q.comfy_quant",
            "only float8_e4m3fn can be read",
        ),
        (
            lambda t: t.update(
                {"blocks.0.to_q.comfy_quant": entry({"format": "int8_tensorwise", "convrot": True, "group_size": 256})}
            ),
            "blocks.0.to_q.comfy_quant",
            "'int8_tensorwise', 'convrot': True, .*: only float8_e4m3fn can be read; .* method='int8' makes its like",
        ),
    ],
)
def test_a_broken_file_is_named_with_the_tensor_and_changes_nothing(
    edit: Callable[[Tensors], Any], tensor: str, message: str, tmp_path: Path
) -> None:
    tensors = compressed_tensors(model(2).state_dict())
    edit(tensors)
    save_file(tensors, tmp_path / FILE)
    m, x = model(2), tokens()
    before = m(x)
    with pytest.raises(fp8_compile.CheckpointError, match=message) as error:
        fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE)
    assert error.value.tensor == tensor
    assert error.value.files == (str(tmp_path / FILE),)
    assert torch.equal(m(x), before)


def test_a_truncated_file_and_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(fp8_compile.CheckpointError, match=r"no \*\.safetensors"):
        fp8_compile.load_fp8_checkpoint(model(1), tmp_path)
    save_file(compressed_tensors(model(1).state_dict()), tmp_path / FILE)
    with open(tmp_path / FILE, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(fp8_compile.CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        fp8_compile.load_fp8_checkpoint(model(1), tmp_path / FILE)


def test_no_files_and_files_without_fp8(tmp_path: Path) -> None:
    with pytest.raises(fp8_compile.CheckpointError, match="expected at least one file, got none"):
        fp8_compile.load_fp8_checkpoint(model(1), [])
    save_file(model(1).state_dict(), tmp_path / FILE)
    m = model(1)
    with pytest.warns(fp8_compile.NothingConvertedWarning, match=r"model\.safetensors: no weight is in FP8") as told:
        fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE)
    assert told[0].filename == __file__
    assert not any(isinstance(p, QuantizedWeight) for p in m.parameters())


def test_a_rotary_table_on_the_meta_device_is_named_and_init_empty_weights_leaves_it_real(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is optional")
    from bench.tiny import build_transformer

    m = build_transformer().bfloat16()
    fp8_compile.quantize_(m, {"min_features": 16})
    fp8_compile.save_fp8_checkpoint(m, tmp_path / FILE)
    with torch.device("meta"):
        m = build_transformer().bfloat16()
    with pytest.raises(fp8_compile.CheckpointError, match=r"'pos_embed\.\w+_freqs' .* on the meta device"):
        fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE)
    assert all(parameter.is_meta for parameter in m.parameters())
    with accelerate.init_empty_weights():
        m = build_transformer().bfloat16()
    fp8_compile.load_fp8_checkpoint(m, tmp_path / FILE)
    assert not any(parameter.is_meta for parameter in m.parameters())
    assert not m.pos_embed.pos_freqs.is_meta
