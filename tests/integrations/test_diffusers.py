"""FP8 through diffusers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
import transformers
from diffusers.quantizers import PipelineQuantizationConfig
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fp8_compile
from fp8_compile import Fp8DiffusionConfig, QuantizedWeight
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

pytestmark = pytest.mark.pipeline

TINY = MODELS["QwenImage"]
OPTIONS: dict[str, Any] = {"min_features": 64, "ignored_layers": ["img_mlp", "transformer_blocks.0.*"]}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A transformer in BF16."""
    folder = tmp_path / "bf16"
    TINY.build().save_pretrained(folder)  # type: ignore[operator]
    return folder


def load(folder: Path, **arguments: Any) -> Any:
    return diffusers.QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, **arguments)


def load_quantized(folder: Path, **options: Any) -> Any:
    return load(folder, quantization_config=Fp8DiffusionConfig(**{**OPTIONS, **options}))


def run(m: nn.Module) -> Tensor:
    return TINY.output(m(**TINY.inputs(0)))


def bits(m: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in m.named_parameters():
        inner = {"": p.qdata, "_scale": p.scale} if isinstance(p, QuantizedWeight) else {"": p}
        found.update({name + suffix: t.contiguous().reshape(-1).view(torch.uint8) for suffix, t in inner.items()})
    return found


def assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = bits(a), bits(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert {n: type(p) for n, p in a.named_parameters()} == {n: type(p) for n, p in b.named_parameters()}


def test_weights_are_quantized_as_they_arrive(saved: Path) -> None:
    m, expected = load_quantized(saved), load(saved)
    fp8_compile.quantize_(expected, OPTIONS)
    assert_same(m, expected)
    assert isinstance(m.transformer_blocks[1].attn.to_q.weight, QuantizedWeight)
    assert type(m.transformer_blocks[0].attn.to_q.weight) is nn.Parameter
    assert fp8_compile.report(m) == fp8_compile.report(expected)
    m.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True, options={"inner_backend": "aot_eager"})
    expected.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True, options={"inner_backend": "aot_eager"})
    assert torch.equal(run(m), run(expected))


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_saved_and_read_back_bit_by_bit(saved: Path, tmp_path: Path, shard: str, granularity: str) -> None:
    m = load_quantized(saved, granularity=granularity)
    m.save_pretrained(tmp_path / "fp8", max_shard_size=shard)
    files = list((tmp_path / "fp8").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "100KB")
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    assert tensors["transformer_blocks.1.attn.to_q.weight"].dtype == torch.float8_e4m3fn
    assert tensors["transformer_blocks.1.attn.to_q.weight_scale"].dtype == torch.float32
    assert tensors["transformer_blocks.0.attn.to_q.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config == {**OPTIONS, "granularity": granularity, "quant_method": "fp8_diffusion"}
    back = load(tmp_path / "fp8")
    assert_same(m, back)
    assert torch.equal(run(m), run(back))
    assert fp8_compile.report(back) == fp8_compile.report(m)


def test_a_model_converted_by_hand_is_saved_alike(saved: Path, tmp_path: Path) -> None:
    m = load(saved)
    fp8_compile.quantize_(m, OPTIONS)
    m.save_pretrained(tmp_path / "fp8")
    size, before = ((folder / WEIGHTS).stat().st_size for folder in (tmp_path / "fp8", saved))
    assert size < 0.8 * before
    assert_same(m, load(tmp_path / "fp8"))


def test_a_model_without_fp8_beside_one_that_was_converted_is_saved_as_it_was(saved: Path, tmp_path: Path) -> None:
    both = nn.ModuleDict({"one": load(saved), "other": load(saved)})
    fp8_compile.quantize_(both, {"min_features": 64, "ignored_layers": ["other"]})
    for name, part in both.items():
        part.save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in both]
    assert ["quantization_config" in config for config in configs] == [True, False]


def test_layers_that_diffusers_keeps_in_float32_are_kept(tmp_path: Path) -> None:
    tiny = MODELS["Wan"]
    tiny.build().save_pretrained(tmp_path)  # type: ignore[operator]
    m = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, quantization_config=Fp8DiffusionConfig(min_features=64)
    )
    assert m.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert rows["condition_embedder.time_embedder.linear_1"].reason == "weight is float32, not bfloat16 or float16"
    assert rows["blocks.0.attn1.to_q"].decision == "quantized"
    assert tiny.output(m(**tiny.inputs(0))).isfinite().all()


def test_a_pipeline(tmp_path: Path) -> None:
    from fp8_compile.embedded import default_pipeline_dir

    config = PipelineQuantizationConfig(quant_mapping={"transformer": Fp8DiffusionConfig(ignored_layers=["img_mlp"])})
    cls: Any = diffusers.QwenImagePipeline
    pipe = cls.from_pretrained(default_pipeline_dir(), torch_dtype=torch.bfloat16, quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    rows = fp8_compile.report(pipe.transformer).layers
    assert {row.decision for row in rows if "img_mlp" in row.path} == {"unquantized"}
    blocks = [row for row in rows if row.path.startswith("transformer_blocks.") and "img_mlp" not in row.path]
    assert {row.decision for row in blocks} == {"quantized"}

    def draw(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": generator}
        return torch.from_numpy(pipe("a red circle", output_type="np", **arguments).images)

    picture = draw(pipe)
    pipe.save_pretrained(tmp_path)
    back = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    back.set_progress_bar_config(disable=True)
    assert_same(pipe.transformer, back.transformer)
    assert torch.equal(draw(back), picture)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_mapping": {"text_encoder": Fp8DiffusionConfig(ignored_layers=["mlp"])}},
        {
            "quant_backend": "fp8_diffusion",
            "quant_kwargs": {"ignored_layers": ["mlp"]},
            "components_to_quantize": ["text_encoder", "transformer"],
        },
    ],
    ids=["quant_mapping", "quant_backend"],
)
def test_a_text_encoder_as_it_is_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    from fp8_compile.embedded import default_pipeline_dir

    cls: Any = diffusers.QwenImagePipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fp8_compile.UnmatchedPatternWarning)  # "mlp" is the encoder's
        arguments = {"quantization_config": PipelineQuantizationConfig(**config), "torch_dtype": torch.bfloat16}
        pipe = cls.from_pretrained(default_pipeline_dir(), **arguments)
    expected = cls.from_pretrained(default_pipeline_dir(), torch_dtype=torch.bfloat16).text_encoder
    fp8_compile.quantize_(expected, {"ignored_layers": ["mlp"]})
    assert_same(pipe.text_encoder, expected)
    assert fp8_compile.report(pipe.text_encoder) == fp8_compile.report(expected)
    assert (fp8_compile.report(pipe.transformer).totals["quantized"] > 0) == ("quant_backend" in config)
    with pytest.raises(ValueError, match="fp8_diffusion and is not serializable"):
        pipe.text_encoder.save_pretrained(tmp_path)


def test_a_text_encoder_keeps_what_transformers_keeps_in_float32_and_names_what_is_broken(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=100, d_model=64, d_ff=128, d_kv=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).bfloat16().save_pretrained(tmp_path)

    def load_t5(dtype: torch.dtype) -> Any:
        quantization = Fp8DiffusionConfig(min_features=64)
        return transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=dtype, quantization_config=quantization)

    rows = {row.path: row for row in fp8_compile.report(load_t5(torch.float16)).layers}
    assert rows["encoder.block.0.layer.0.SelfAttention.q"].decision == "quantized"
    kept = "weight is float32, not bfloat16 or float16"
    assert {row.reason for path, row in rows.items() if path.endswith("wo")} == {kept}

    name = "encoder.block.1.layer.0.SelfAttention.v"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{name}.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fp8_compile.NonFiniteWeightError) as error:
        load_t5(torch.bfloat16)
    assert error.value.layers == (name,)


# --- FP8 without a configuration of ours; other ways in ---


@pytest.fixture
def foreign(saved: Path, tmp_path: Path) -> Path:
    """The attention in FP8 as another tool writes it, and a config that says nothing."""
    folder = tmp_path / "foreign"
    shutil.copytree(saved, folder)
    broken(folder, in_fp8)
    return folder


def in_fp8(tensors: dict[str, Tensor]) -> None:
    for name, value in list(tensors.items()):
        if value.dim() == 2 and ".attn." in name:
            scale = value.float().abs().amax() / 448
            tensors[name], tensors[f"{name}_scale"] = (value.float() / scale).to(torch.float8_e4m3fn), scale
            tensors[name.replace("weight", "input_scale")] = torch.tensor(0.01)


def is_fp8(m: nn.Module, path: str) -> bool:
    return isinstance(m.get_submodule(path).weight, QuantizedWeight)


TO_Q, MLP = "transformer_blocks.1.attn.to_q", "transformer_blocks.1.img_mlp.net.2"


def test_fp8_weights_are_taken_as_they_are_whatever_the_config_of_their_folder_says(foreign: Path, saved: Path) -> None:
    tensors = load_file(foreign / WEIGHTS)
    m = load(foreign, quantization_config=Fp8DiffusionConfig(min_features=10_000))
    assert torch.equal(
        m.get_submodule(TO_Q).weight.qdata.view(torch.uint8), tensors[f"{TO_Q}.weight"].view(torch.uint8)
    )
    assert m.get_submodule(TO_Q).weight.scale == tensors[f"{TO_Q}.weight_scale"]
    assert not is_fp8(m, MLP)
    m = load(foreign, quantization_config=Fp8DiffusionConfig(min_features=64))
    assert is_fp8(m, TO_Q)
    assert is_fp8(m, MLP)
    assert sqnr(run(load(saved)), run(m)) > 24


def test_layers_that_shall_be_kept_get_the_numbers_that_fp8_and_scale_stand_for(foreign: Path, saved: Path) -> None:
    m = load(foreign, quantization_config=Fp8DiffusionConfig(min_features=64, ignored_layers=["attn"], strict=True))
    tensors = load_file(foreign / WEIGHTS)
    expected = (tensors[f"{TO_Q}.weight"].float() * tensors[f"{TO_Q}.weight_scale"]).bfloat16()
    assert type(m.get_submodule(TO_Q).weight) is not QuantizedWeight
    assert torch.equal(m.get_submodule(TO_Q).weight, expected)
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert rows[TO_Q].reason == "ignored_layers: attn"
    assert is_fp8(m, MLP)
    assert sqnr(run(load(saved)), run(m)) > 24


def test_tensors_that_the_model_does_not_know_are_still_said_and_scales_are_not_among_them(foreign: Path) -> None:
    def edit(t: dict[str, Tensor]) -> None:
        t.update({"other.weight": t[f"{TO_Q}.weight"].clone(), "other.weight_scale": torch.tensor(1.0)})
        t.pop(f"{TO_Q}.bias")

    config = Fp8DiffusionConfig(min_features=64)
    _, told = load(broken(foreign, edit), quantization_config=config, output_loading_info=True)
    assert told["unexpected_keys"] == ["other.weight"]
    assert told["missing_keys"] == [f"{TO_Q}.bias"]


def test_numbers_without_a_meaning_are_refused(saved: Path) -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32):
        folder = saved.parent / str(dtype)
        shutil.copytree(saved, folder)
        broken(folder, lambda t, dtype=dtype: t.update({f"{MLP}.weight": t[f"{MLP}.weight"].to(dtype)}))  # type: ignore[misc]
        with pytest.raises(fp8_compile.CheckpointError, match=f"{MLP}.weight' is .* without a scale"):
            load_quantized(folder)


def from_single_file(saved: Path, file: Path, **options: Any) -> Any:
    return diffusers.QwenImageTransformer2DModel.from_single_file(
        file, config=str(saved), dtype=torch.bfloat16, quantization_config=Fp8DiffusionConfig(**{**OPTIONS, **options})
    )


def test_a_single_file_is_converted_as_a_folder_is(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file(load_file(saved / WEIGHTS), file)
    m = from_single_file(saved, file, strict=True)
    assert_same(m, load_quantized(saved))
    with pytest.raises(fp8_compile.NothingConvertedError, match="narrower than min_features"):
        from_single_file(saved, file, strict=True, min_features=10_000)
    m.save_pretrained(tmp_path / "fp8")
    assert_same(m, load(tmp_path / "fp8"))


def test_a_single_file_in_fp8(saved: Path, foreign: Path) -> None:
    m = from_single_file(saved, foreign / WEIGHTS, ignored_layers=["transformer_blocks.0"])
    expected = load(
        foreign, quantization_config=Fp8DiffusionConfig(min_features=64, ignored_layers=["transformer_blocks.0"])
    )
    assert_same(m, expected)
    broken(foreign, lambda t: t.pop(f"{TO_Q}.weight_scale"))
    with pytest.raises(fp8_compile.CheckpointError, match=f"{TO_Q}.weight' is FP8 values without a scale"):
        from_single_file(saved, foreign / WEIGHTS)


def test_a_weight_to_convert_that_is_in_no_file_is_an_error(saved: Path) -> None:
    broken(saved, lambda t: t.pop(f"{TO_Q}.weight"))
    with pytest.raises(fp8_compile.CheckpointError, match=f"{TO_Q}.weight' is missing"):
        load_quantized(saved)
    with pytest.raises(fp8_compile.CheckpointError, match=f"{TO_Q}.weight' is missing"):
        from_single_file(saved, saved / WEIGHTS)


def test_a_saved_configuration_over_weights_that_are_not_in_fp8_is_said(saved: Path, tmp_path: Path) -> None:
    load_quantized(saved).save_pretrained(tmp_path / "fp8")
    shutil.copy(saved / WEIGHTS, tmp_path / "fp8" / WEIGHTS)
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="not in FP8 in the checkpoint"):
        load(tmp_path / "fp8")


def on_disk(m: nn.Module, *names: str) -> dict[str, str]:
    return {name: "disk" if name in names else "cpu" for name, _ in m.named_children()}


def test_with_a_part_on_the_disk_the_rest_is_converted_and_the_part_is_said(saved: Path, tmp_path: Path) -> None:
    plain = load(saved)
    where = {"device_map": on_disk(plain, "transformer_blocks"), "offload_folder": tmp_path / "offload"}
    config = {"min_features": 64}
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="42 linears were not quantized, because device_map"):
        m = load(saved, quantization_config=Fp8DiffusionConfig(**config), **where)
    assert is_fp8(m, "proj_out")
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert rows[TO_Q].reason == "weight is offloaded by device_map"
    assert sqnr(run(plain), run(m)) > 24
    with pytest.raises(fp8_compile.NothingConvertedError, match="42 linears"):
        load(saved, quantization_config=Fp8DiffusionConfig(**config, strict=True), **where)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fp8_compile.NothingConvertedWarning)
        kept = Fp8DiffusionConfig(**config, ignored_layers=["transformer_blocks"])
        assert is_fp8(load(saved, quantization_config=kept, **where), "proj_out")


def test_fp8_files_are_not_put_on_the_disk(saved: Path, foreign: Path, tmp_path: Path) -> None:
    load_quantized(saved).save_pretrained(tmp_path / "fp8")
    where = {"device_map": on_disk(load(saved), "transformer_blocks"), "offload_folder": tmp_path / "offload"}
    with pytest.raises(fp8_compile.OptionError, match="device_map puts parts of the model on the disk"):
        load(tmp_path / "fp8", **where)
    with pytest.raises(fp8_compile.OptionError, match="device_map puts parts of the model on the disk"):
        load(foreign, quantization_config=Fp8DiffusionConfig(min_features=64), **where)


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    config = transformers.T5Config(vocab_size=100, d_model=64, d_ff=128, d_kv=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).bfloat16().save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_a_text_encoder_with_a_part_on_the_disk(t5: Path, tmp_path: Path) -> None:
    def load_t5(**options: Any) -> Any:
        others = ("shared", "encoder.embed_tokens", "encoder.block.0", "encoder.final_layer_norm", "encoder.dropout")
        where = {**dict.fromkeys(others, "cpu"), "encoder.block.1": "disk"}
        config = Fp8DiffusionConfig(min_features=64, **options)
        return transformers.T5EncoderModel.from_pretrained(
            t5, dtype=torch.bfloat16, quantization_config=config, device_map=where, offload_folder=tmp_path / "offload"
        )

    ids = torch.arange(12)[None]
    expected = transformers.T5EncoderModel.from_pretrained(t5, dtype=torch.bfloat16)(ids).last_hidden_state
    with pytest.warns(fp8_compile.NothingConvertedWarning, match="6 linears were not quantized, because device_map"):
        m = load_t5()
    assert is_fp8(m, "encoder.block.0.layer.0.SelfAttention.q")
    assert sqnr(expected, m(ids).last_hidden_state) > 20
    with pytest.raises(fp8_compile.NothingConvertedError, match="6 linears"):
        load_t5(strict=True)


def test_a_text_encoder_in_fp8_is_refused_by_the_way_that_would_lose_its_scales(t5: Path) -> None:
    tensors = load_file(t5 / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file({**tensors, f"{name}_scale": torch.tensor(0.1)}, t5 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fp8_compile.CheckpointError, match=f"{name}' is in FP8: .*load_fp8_checkpoint"):
        transformers.T5EncoderModel.from_pretrained(t5, quantization_config=Fp8DiffusionConfig(min_features=64))


# --- what else diffusers does with a converted model ---


def test_memory_is_planned_and_counted_as_it_is_used(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    original = accelerate.infer_auto_device_map

    def spy(model: nn.Module, dtype: Any, special_dtypes: Any, **others: Any) -> Any:
        sizes = accelerate.utils.compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes)
        planned.append(sizes[""])
        return original(model, dtype=dtype, special_dtypes=special_dtypes, **others)

    monkeypatch.setattr("diffusers.models.model_loading_utils.infer_auto_device_map", spy)
    config = Fp8DiffusionConfig(min_features=64, ignored_layers=["img_mlp", "txt_mlp"])
    m = load(saved, quantization_config=config, device_map="auto")
    scales = sum(p.scale.nbytes for p in m.parameters() if isinstance(p, QuantizedWeight))
    used = sum(p.nbytes for p in m.parameters())
    assert planned == [used - scales]
    assert m.get_memory_footprint(return_buffers=False) == used - scales
    m.save_pretrained(saved.parent / "fp8")
    load(saved.parent / "fp8", device_map="auto")
    assert planned == [used - scales] * 2


@pytest.mark.parametrize("how", ["quantize_", "from_pretrained", "load_fp8_checkpoint"])
def test_layerwise_casting_leaves_converted_weights_alone(saved: Path, tmp_path: Path, how: str) -> None:
    m = load_quantized(saved) if how == "from_pretrained" else load(saved)
    if how == "quantize_":
        fp8_compile.quantize_(m, OPTIONS)
    if how == "load_fp8_checkpoint":
        fp8_compile.save_fp8_checkpoint(load_quantized(saved), tmp_path / "one.safetensors")
        fp8_compile.load_fp8_checkpoint(m, tmp_path / "one.safetensors")
    expected = run(m)
    m.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert m.get_submodule(MLP).weight.dtype == torch.float8_e4m3fn
    assert is_fp8(m, TO_Q)
    assert sqnr(expected, run(m)) > 15  # plain FP8 without scales, in what is not ours
    assert is_fp8(m, TO_Q)


def test_a_dequantized_model_is_as_any_other(saved: Path, tmp_path: Path) -> None:
    m = load_quantized(saved)
    expected = run(m)
    m.dequantize()
    m.save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error", fp8_compile.NothingConvertedWarning)
        back = load(tmp_path / "plain")
    assert torch.equal(run(back), expected)
    m.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert m.get_submodule(TO_Q).weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("upcast", [False, True])
def test_adapters_of_a_converted_model_are_saved(saved: Path, tmp_path: Path, upcast: bool) -> None:
    def with_adapter(weights: Path | None) -> Any:
        m = load_quantized(saved)
        if weights is None:
            m.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
        else:
            m.load_lora_adapter(weights, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        return m

    m = with_adapter(None)
    expected = run(m)
    m.save_lora_adapter(tmp_path / "lora", upcast_before_saving=upcast)
    assert torch.equal(run(with_adapter(tmp_path / "lora")), expected)
    assert is_fp8(m, f"{TO_Q}.base_layer")


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_to_the_disk_is_refused_when_it_is_switched_on(
    saved: Path, tmp_path: Path, offload_type: str
) -> None:
    m = load_quantized(saved)
    expected = run(m)
    with pytest.raises(fp8_compile.QuantizedWeightError, match="Offload to memory instead of the disk"):
        m.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path / "offload"),
        )
    assert torch.equal(run(m), expected)


def test_a_part_that_was_converted_is_refused_in_words_until_the_model_is_asked(saved: Path, tmp_path: Path) -> None:
    m = load(saved)
    fp8_compile.quantize_(m.transformer_blocks, {"min_features": 64})
    with pytest.raises(
        fp8_compile.QuantizedWeightError, match=r"call fp8_compile.quantize_\(model\) on the model itself"
    ):
        m.save_pretrained(tmp_path / "fp8")
    fp8_compile.quantize_(m, {"min_features": 64})
    m.save_pretrained(tmp_path / "fp8")
    assert_same(m, load(tmp_path / "fp8"))


def compiled_blocks(m: Any) -> Any:
    for i, block in enumerate(m.transformer_blocks):
        m.transformer_blocks[i] = torch.compile(block, backend="eager")
    return m


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        nn.DataParallel,
        lambda m: get_peft_model(m, LoraConfig(target_modules=["to_q"])).unload(),
        compiled_blocks,
    ],
    ids=["compile", "DataParallel", "PeftModel", "compiled blocks"],
)
def test_a_model_that_was_converted_inside_of_a_wrapper_is_saved(
    saved: Path, tmp_path: Path, wrap: Callable[[Any], Any]
) -> None:
    m = load(saved)
    fp8_compile.quantize_(wrap(m), OPTIONS)
    m.save_pretrained(tmp_path / "fp8")
    assert torch.equal(run(load(tmp_path / "fp8")), run(m))


def test_a_model_filled_from_an_fp8_file_is_saved(saved: Path, tmp_path: Path) -> None:
    fp8_compile.save_fp8_checkpoint(load_quantized(saved), tmp_path / "one.safetensors")
    fp8_compile.load_fp8_checkpoint(m := load(saved), tmp_path / "one.safetensors")
    m.save_pretrained(tmp_path / "fp8", variant="fp8")
    assert_same(m, load(tmp_path / "fp8", variant="fp8"))


def test_a_model_saved_by_pickle_is_read_back(saved: Path, tmp_path: Path) -> None:
    m = load_quantized(saved)
    m.save_pretrained(tmp_path / "fp8", safe_serialization=False)
    assert_same(m, load(tmp_path / "fp8", use_safetensors=False))


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_tied_weights_come_back_tied(saved: Path, tmp_path: Path, shard: str) -> None:
    m = load(saved)
    other = TO_Q.replace("1", "2")
    m.get_submodule(other).weight = m.get_submodule(TO_Q).weight
    fp8_compile.quantize_(m, OPTIONS)
    m.save_pretrained(tmp_path / "fp8", max_shard_size=shard)
    back = load(tmp_path / "fp8")
    assert back.get_submodule(other).weight is back.get_submodule(TO_Q).weight
    assert torch.equal(run(back), run(m))


# --- errors ---


def broken(folder: Path, edit: Callable[[dict[str, Tensor]], Any], metadata: dict[str, str] | None = None) -> Path:
    """Edit the tensors of a folder; the metadata stays as it is, or is ``metadata``."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = metadata or file.metadata()
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    return folder


NAME = "transformer_blocks.1.attn.to_q.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scale"), f"{NAME}' is FP8 values without a scale"),
        (lambda t: t.pop(NAME), f"{NAME}_scale' is a scale without FP8 values"),
        (lambda t: t[f"{NAME}_scale"].fill_(float("nan")), f"{NAME}_scale' holds a scale that is NaN"),
        (lambda t: t[f"{NAME}_scale"].zero_(), f"{NAME}_scale' holds a scale that is NaN, infinite, zero"),
        (lambda t: t.update({f"{NAME}_scale": torch.ones(3, 1)}), f"{NAME}_scale' has shape \\[3, 1\\]"),
        (
            lambda t: t.update({NAME: t[NAME][:32].clone(), f"{NAME}_scale": t[f"{NAME}_scale"][:32].clone()}),
            f"{NAME}' has shape \\[32, 64\\], and the model's has \\[64, 64\\]",
        ),
        (lambda t: t[f"{NAME}_scale"].fill_(float("inf")), f"{NAME}_scale' holds a scale that is NaN, infinite"),
        (lambda t: t[f"{NAME}_scale"].fill_(1e38), f"{NAME}_scale' holds a scale above"),
        (lambda t: t[NAME].view(torch.uint8)[3, 5].fill_(0x7F), f"{NAME}' holds NaN"),
        (lambda t: t[NAME].view(torch.uint8)[3, 5].fill_(0xFF), f"{NAME}' holds NaN"),
        (lambda t: t.update({NAME: t[NAME].bfloat16()}), "a scale without FP8 values: .* holds bfloat16"),
        (lambda t: t.update({NAME: t[NAME].view(torch.int8)}), "a scale without FP8 values: .* holds int8"),
        (lambda t: t.update({NAME: t[NAME].to(torch.float8_e5m2)}), "a scale without FP8 values: .* holds float8_e5m2"),
    ],
)
@pytest.mark.parametrize("config", [None, Fp8DiffusionConfig(min_features=64)], ids=["saved config", "given config"])
def test_a_broken_checkpoint_names_file_and_tensor(
    saved: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str, config: Any
) -> None:
    load_quantized(saved).save_pretrained(tmp_path / "fp8")
    broken(tmp_path / "fp8", edit, metadata={"format": "pt"} if config else None)
    if config:
        (tmp_path / "fp8" / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(fp8_compile.CheckpointError, match=message) as error:
        load(tmp_path / "fp8", quantization_config=config)
    assert error.value.tensor is not None
    assert error.value.tensor.startswith(NAME)
    assert [Path(file).name for file in error.value.files] == [WEIGHTS]


def test_of_several_files_the_one_with_the_tensor_is_named(saved: Path, tmp_path: Path) -> None:
    load_quantized(saved).save_pretrained(tmp_path / "fp8", max_shard_size="100KB")
    index = json.loads((tmp_path / "fp8" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    file = tmp_path / "fp8" / index[f"{NAME}_scale"]
    tensors = load_file(file)
    tensors[f"{NAME}_scale"][3] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(fp8_compile.CheckpointError) as error:
        load(tmp_path / "fp8")
    assert error.value.files == (str(file),)


def test_a_weight_without_a_scale_is_an_error_that_names_the_layer(saved: Path) -> None:
    broken(saved, lambda t: t[NAME].fill_(float("inf")))
    with pytest.raises(fp8_compile.NonFiniteWeightError) as error:
        load_quantized(saved)
    assert error.value.layers == (NAME.removesuffix(".weight"),)


def test_options_are_checked_where_they_are_written(saved: Path) -> None:
    with pytest.raises(fp8_compile.OptionError, match="did you mean 'ignored_layers'"):
        Fp8DiffusionConfig(ignore_layers=["img_mlp"])
    with pytest.raises(fp8_compile.OptionError, match=r"inner_backend.*torch\.compile"):
        Fp8DiffusionConfig(inner_backend="eager")
    with pytest.raises(fp8_compile.OptionError, match=r"epilogue_fusion.*torch\.compile"):
        Fp8DiffusionConfig(epilogue_fusion=False)
    with pytest.raises(fp8_compile.PatternError, match="did you mean 'img_mlp'"):
        load_quantized(saved, ignored_layers=["img_mpl"])
    assert json.loads(Fp8DiffusionConfig(granularity="tensor").to_json_string())["granularity"] == "tensor"


@pytest.mark.parametrize(
    "order",
    [
        "import fp8_compile, diffusers",
        "import diffusers, fp8_compile",
        "from fp8_compile import Fp8DiffusionConfig; import diffusers",
        "import transformers.quantizers.auto, fp8_compile, diffusers",
    ],
)
def test_the_order_of_imports_does_not_matter(saved: Path, tmp_path: Path, order: str) -> None:
    load_quantized(saved).save_pretrained(tmp_path / "fp8")
    code = f"""
        {order}
        m = diffusers.QwenImageTransformer2DModel.from_pretrained({str(tmp_path / "fp8")!r})
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
        print(type(m.transformer_blocks[1].attn.to_q.weight).__name__, m.dtype, "fp8_diffusion" in table)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["QuantizedWeight", "torch.bfloat16", "True"]
