"""FP8 files under the names of a model's author, which diffusers converts: no number is rounded twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

import fp8_compile
from fp8_compile import Fp8DiffusionConfig, QuantizedWeight
from fp8_compile.integrations.conversion import Rows
from fp8_compile.schemes import scheme_named
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

pytestmark = pytest.mark.pipeline


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def quantized(weight: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    made = QuantizedWeight.quantize(weight, scheme_named("fp8", {"granularity": granularity}))
    return made.qdata, made.scale


def z_image_by_its_author(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `convert_z_image_transformer_checkpoint_to_diffusers` expects: Q, K and V are one projection."""
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".to_q.weight" in name:
            value = torch.cat([state[name.replace("to_q", to)] for to in ("to_q", "to_k", "to_v")])
            made[name.replace("to_q", "qkv")] = value
        elif ".to_k." not in name and ".to_v." not in name:
            for own, theirs in (
                ("all_final_layer.2-1.", "final_layer."),
                ("all_x_embedder.2-1.", "x_embedder."),
                ("attention.to_out.0.", "attention.out."),
                ("attention.norm_k.", "attention.k_norm."),
                ("attention.norm_q.", "attention.q_norm."),
            ):
                name = name.replace(own, theirs)
            made[name] = value
    return made


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scales_follow_their_rows_through_the_conversion(tmp_path: Path, granularity: str, prefix: str) -> None:
    tiny = MODELS["ZImage"]
    plain: Any = tiny.build()
    plain.save_pretrained(tmp_path / "bf16")
    tensors: dict[str, Tensor] = {}
    for name, value in z_image_by_its_author(plain.state_dict()).items():
        if "layers." in name and value.dim() == 2 and value.shape[0] % 48 == 0:
            tensors[name], tensors[f"{name}_scale"] = quantized(value, granularity)
        else:
            tensors[name] = value
    fused = "layers.0.attention.qkv.weight"
    assert fused in tensors
    save_file({f"{prefix}{name}": value.contiguous() for name, value in tensors.items()}, tmp_path / "one.safetensors")
    m: Any = diffusers.ZImageTransformer2DModel.from_single_file(
        str(tmp_path / "one.safetensors"),
        config=str(tmp_path / "bf16"),
        dtype=torch.bfloat16,
        quantization_config=Fp8DiffusionConfig(min_features=10_000),
    )
    for i, to in enumerate(("to_q", "to_k", "to_v")):
        weight = m.get_submodule(f"layers.0.attention.{to}").weight
        assert isinstance(weight, QuantizedWeight)
        assert weight.scheme.options["granularity"] == granularity
        rows = slice(i * len(weight), (i + 1) * len(weight))
        assert torch.equal(weight.qdata.view(torch.uint8), tensors[fused][rows].view(torch.uint8))
        scale = tensors[f"{fused}_scale"]
        assert torch.equal(weight.scale, scale[rows] if granularity == "row" else scale)
    expected, result = (tiny.output(each(**tiny.inputs(0))) for each in (plain, m))
    assert sqnr(expected, result) > 20


def flux_by_its_author() -> dict[str, Tensor]:
    """One block of each kind. The conversion knows how many rows there are, and not how many columns."""
    width, k = 3072, 16
    names = ("time_in.in_layer", "time_in.out_layer", "vector_in.in_layer", "vector_in.out_layer", "txt_in", "img_in")
    linears = {
        **dict.fromkeys(names, width),
        "final_layer.linear": 64,
        "final_layer.adaLN_modulation.1": 2 * width,
        "single_blocks.0.modulation.lin": 3 * width,
        "single_blocks.0.linear1": 7 * width,
        "single_blocks.0.linear2": width,
    }
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        linears |= {f"{block}_mod.lin": 6 * width, f"{block}_attn.qkv": 3 * width, f"{block}_attn.proj": width}
        linears |= {f"{block}_mlp.0": 4 * width, f"{block}_mlp.2": width}
    norms = [f"double_blocks.0.{s}_attn.norm.{n}_norm.scale" for s in ("img", "txt") for n in ("query", "key")]
    norms += [f"single_blocks.0.norm.{n}_norm.scale" for n in ("query", "key")]
    generator = torch.Generator().manual_seed(0)
    weights = {f"{n}.weight": torch.randn(rows, k, generator=generator).bfloat16() for n, rows in linears.items()}
    return {
        **weights,
        **{f"{n}.bias": torch.zeros(rows) for n, rows in linears.items()},
        **{n: torch.ones(8) for n in norms},
    }


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_flux_which_exchanges_halves_too(granularity: str) -> None:
    scheme = scheme_named("fp8", {"granularity": granularity})
    original = flux_by_its_author()
    weights = {n: QuantizedWeight.quantize(v, scheme) for n, v in original.items() if v.dim() == 2}
    converted = convert_flux_transformer_checkpoint_to_diffusers(
        {n: Rows.of(weights[n]) if n in weights else v for n, v in original.items()}
    )
    expected = convert_flux_transformer_checkpoint_to_diffusers(
        {n: weights[n].dequantize() if n in weights else v for n, v in original.items()}
    )
    assert converted.keys() == expected.keys()
    for name, value in converted.items():
        if value.dim() == 2:
            assert isinstance(value, Rows), name
            assert value.weight().scheme == scheme
            assert torch.equal(value.weight().dequantize(), expected[name]), name


def rows(granularity: str = "tensor", factor: float = 1.0) -> Rows:
    weight = torch.randn(8, 16).bfloat16() * factor
    return Rows.of(QuantizedWeight.quantize(weight, scheme_named("fp8", {"granularity": granularity})))


def test_weights_with_one_scale_each_are_one_with_a_scale_for_each_row() -> None:
    pieces = [rows("tensor"), rows("tensor", 100), rows("row")]
    made = torch.cat(pieces).weight()  # type: ignore[attr-defined]
    assert made.scheme == scheme_named("fp8", {"granularity": "row"})
    assert torch.equal(made.dequantize(), torch.cat([piece.weight().dequantize() for piece in pieces]))


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w.t(),
        lambda w: torch.cat([w, w], dim=1),
        lambda w: w.chunk(2, dim=1),
        lambda w: w.float(),
        lambda w: w + 1,
        lambda w: torch.cat([w, torch.zeros(8, 16)]),
        lambda w: torch.cat([torch.zeros(8, 16), w]),
    ],
)
def test_what_scales_cannot_follow_is_refused_in_words(operation: Any) -> None:
    with pytest.raises(fp8_compile.QuantizedWeightError, match=r"whose scales cannot follow; .*load_fp8_checkpoint"):
        operation(rows())
