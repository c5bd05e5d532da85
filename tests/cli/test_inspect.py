"""``fp8-diffusion inspect`` and ``convert``, also of pipelines with two denoisers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from fp8_compile.cli.main import app
from tests.support.pipelines import build_wan

pytestmark = pytest.mark.pipeline


def run(*arguments: object, status: int = 0) -> Any:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == status, done.output
    return done


@pytest.fixture
def two_denoisers(tmp_path: Path) -> Path:
    pipe = build_wan()
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    config |= {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 256}  # wide enough to be converted
    one, other = (type(pipe.transformer)(**config).bfloat16() for _ in range(2))
    pipe.register_modules(transformer=one, transformer_2=other)
    pipe.register_to_config(boundary_ratio=0.5)
    pipe.save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


def test_what_is_said_before_agrees_with_what_is_done(tmp_path: Path) -> None:
    said = json.loads(run("inspect", "--ignored-layers", "img_mlp", "--json").stdout)
    (plan,) = said["denoisers"]
    assert (plan["name"], plan["bytes_before"], plan["in_files"]) == ("transformer", 10193536, 0)
    assert said["peaks"]["fp8"] < said["peaks"]["unquantized"] < said["peaks"]["compile"]
    run("convert", "--ignored-layers", "img_mlp", "--output", tmp_path / "fp8")
    found = json.loads(run("inspect", tmp_path / "fp8", "--json").stdout)["denoisers"][0]
    assert (found["in_files"], found["bytes_after"]) == (28, plan["bytes_after"])
    told = run("inspect", "--ignored-layers", "img_mlp").stdout
    assert "28 of 34 linears would be quantized, 10.2 MB -> 6.3 MB" in told
    assert "stay: transformer_blocks.{0..1}.img_mlp.net.0.proj" in told
    drawing = ["generate", "a red circle", "--inner-backend", "eager", "--height", 64, "--width", 64, "--steps", 2]
    drawing += ["--true-cfg-scale", 1]
    pictures = []
    for i, more in enumerate((["--model", tmp_path / "fp8"], ["--load", "fp8", "--ignored-layers", "img_mlp"])):
        torch.compiler.reset()
        run(*drawing, *more, "--output", tmp_path / f"{i}.png")
        pictures.append(Image.open(tmp_path / f"{i}.png").tobytes())
    assert pictures[0] == pictures[1]
    refused = run(*drawing, "--model", tmp_path / "fp8", "--ignored-layers", "txt_mlp", status=2).output
    assert (
        "--ignored-layers txt_mlp: transformer_blocks.0.txt_mlp.net.0.proj of the transformer is quantized" in refused
    )


def test_two_denoisers_are_inspected_and_converted_whole(two_denoisers: Path, tmp_path: Path) -> None:
    options = ["--ignored-layers", "none"]
    found = json.loads(run("inspect", two_denoisers, *options, "--json").stdout)["denoisers"]
    assert [plan["name"] for plan in found] == ["transformer", "transformer_2"]
    run(
        "convert", two_denoisers, *options, "--granularity", "tensor", "--format", "comfyui", "--output", tmp_path / "c"
    )
    for plan in found:
        with safe_open(tmp_path / "c" / f"{plan['name']}.safetensors", "pt") as file:
            marks = [name for name in file.keys() if name.endswith("comfy_quant")]  # noqa: SIM118
        assert len(marks) == sum(row["decision"] == "quantized" for row in plan["layers"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "gguf"], "--format 'gguf' is not valid; valid: pipeline, fp8_compile, compressed-tensors"),
        (["--output", "."], "exists already"),
        (["--format", "comfyui", "--text-encoder-quantization", "fp8"], "text encoders are not written"),
    ],
)
def test_conversions_that_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in run("convert", "--output", tmp_path / "out", *arguments, status=2).output


def test_no_such_model() -> None:
    assert "could not be loaded" in run("inspect", "no/such/model", status=2).output
