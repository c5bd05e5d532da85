"""FP8 through diffusers' own from_pretrained and save_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fp8_compile
from fp8_compile import Fp8DiffusionConfig, QuantizedWeight
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


# --- errors ---


def broken(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


NAME = "transformer_blocks.1.attn.to_q.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scale"), f"{NAME}' is quantized values without a scale"),
        (lambda t: t.pop(NAME), f"{NAME}_scale' is a scale without quantized values"),
        (lambda t: t[f"{NAME}_scale"].fill_(float("nan")), f"{NAME}_scale' holds a scale that is NaN"),
        (lambda t: t[f"{NAME}_scale"].zero_(), f"{NAME}_scale' holds a scale that is NaN, infinite, zero"),
        (lambda t: t.update({f"{NAME}_scale": torch.ones(3, 1)}), f"{NAME}_scale' has shape \\[3, 1\\]"),
        (
            lambda t: t.update({NAME: t[NAME][:32].clone(), f"{NAME}_scale": t[f"{NAME}_scale"][:32].clone()}),
            f"{NAME}' has shape \\[32, 64\\], and the model's has \\[64, 64\\]",
        ),
    ],
)
def test_a_broken_checkpoint_names_file_and_tensor(
    saved: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    load_quantized(saved).save_pretrained(tmp_path / "fp8")
    broken(tmp_path / "fp8", edit)
    with pytest.raises(fp8_compile.CheckpointError, match=message) as error:
        load(tmp_path / "fp8")
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
