"""What is kept by model: the table, and ``ignored_layers="recommended"`` through every entrance."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import fp8_compile
from fp8_compile.errors import PatternError, UnmatchedPatternWarning
from fp8_compile.recipes import RECIPES, recommended, table
from fp8_compile.recipes.recipe import SOURCES
from tests.support.blocks import WIDTH, Model
from tests.support.zoo import MODELS

OPTIONS: dict[str, Any] = {"ignored_layers": "recommended", "min_features": 64}
COMPILED = {**OPTIONS, "inner_backend": "aot_eager"}


def kept(model: nn.Module) -> set[str]:
    """The layers that a pattern keeps."""
    rows = fp8_compile.report(model).layers
    return {row.path for row in rows if row.decision == "unquantized" and "ignored_layers" in row.reason}


def is_img_mlp(path: str) -> bool:
    return "img_mlp" in path.split(".")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.transformer)
def test_a_recipe_names_what_diffusers_has(recipe: Any) -> None:
    pipeline: Any = getattr(diffusers, recipe.pipeline)
    assert recipe.transformer in str(inspect.signature(pipeline.__init__).parameters["transformer"].annotation)
    assert inspect.signature(pipeline.__call__).parameters["num_inference_steps"].default == recipe.steps
    assert recipe.transformer == getattr(diffusers, recipe.transformer).__name__
    assert recipe.says


def test_every_source_is_cited() -> None:
    said = " ".join(recipe.says for recipe in RECIPES.values())
    assert [name for name in SOURCES if f"[{name}]" not in said] == []


def test_the_documentation_has_the_table_of_today() -> None:
    text = (Path(__file__).parents[1] / "docs/models.md").read_text()
    assert table() in text, "put what `python -m fp8_compile.recipes` prints into docs/models.md"


def test_recommended() -> None:
    model = MODELS["QwenImage"].build()
    assert recommended(model) == ("img_mlp",)
    assert recommended(nn.Sequential(model)) == ("img_mlp",)
    assert recommended(MODELS["ZImage"].build()) == ()
    assert recommended(nn.Linear(4, 4)) == ()


@pytest.mark.parametrize("way", ["whole", "blocks", "wrapped", "load", "load, then whole"])
def test_every_entrance_keeps_the_same(way: str) -> None:
    tiny = MODELS["QwenImage"]
    model = tiny.build()
    torch._dynamo.reset()
    run: Any = model
    if way.startswith("load"):
        fp8_compile.quantize_(model, OPTIONS)
    if way == "wrapped":
        run = nn.Sequential(model)
        forward = run.forward
        run.forward = lambda **inputs: run[0](**inputs)
        assert forward is not None
    if way in ("whole", "wrapped"):
        run.compile(backend="fp8_diffusion", options=COMPILED)
    elif way == "blocks":
        model.compile_repeated_blocks(backend="fp8_diffusion", options=COMPILED)  # type: ignore[operator]
    elif way == "load, then whole":
        model.compile(backend="fp8_diffusion", options={"inner_backend": "aot_eager"})
    with torch.no_grad():
        run(**tiny.inputs(0))
    found = kept(run)
    assert found
    assert all(map(is_img_mlp, found))
    quantized = {row.path for row in fp8_compile.report(run).layers if row.decision == "quantized"}
    assert quantized
    assert not any(map(is_img_mlp, quantized))


def test_beside_other_patterns_and_through_from_pretrained(tmp_path: Path) -> None:
    tiny = MODELS["QwenImage"]
    tiny.build().save_pretrained(tmp_path / "bf16")  # type: ignore[operator]
    config = fp8_compile.Fp8DiffusionConfig(ignored_layers=["recommended", "to_out"], min_features=64)
    model = diffusers.QwenImageTransformer2DModel.from_pretrained(
        tmp_path / "bf16", quantization_config=config, torch_dtype=torch.bfloat16
    )
    found = kept(model)
    assert any(map(is_img_mlp, found))
    assert any("to_out" in path for path in found)
    # What was kept is in the file by its own name: a recipe may change.
    model.save_pretrained(tmp_path / "fp8")
    again = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path / "fp8", torch_dtype=torch.bfloat16)
    assert again.config["quantization_config"].ignored_layers == ["img_mlp", "to_out"]
    assert kept(again) == found


@pytest.mark.parametrize("way", ["compile", "load"])
def test_a_model_without_a_recipe_is_a_warning(way: str) -> None:
    torch._dynamo.reset()
    model = Model(1).bfloat16().eval()

    def convert() -> None:
        if way == "load":
            fp8_compile.quantize_(model, OPTIONS)
        else:
            model.compile(backend="fp8_diffusion", options=COMPILED)
            model(torch.randn(16, WIDTH).bfloat16())

    with torch.no_grad(), pytest.warns(UnmatchedPatternWarning, match="no recipe for Model, so it keeps nothing"):
        convert()
    assert fp8_compile.report(model).totals["quantized"] > 0


def test_a_recipe_that_keeps_nothing_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnmatchedPatternWarning)
        fp8_compile.quantize_(model := MODELS["ZImage"].build(), OPTIONS)
    assert kept(model) == set()


def test_another_word_is_still_no_list() -> None:
    with pytest.raises(PatternError, match=r"'recomended': expected a list of patterns, .* or 'recommended'"):
        fp8_compile.Fp8Options(ignored_layers="recomended")  # type: ignore[arg-type]
