"""What is kept by model: the table, and ``ignored_layers="recommended"`` through every entrance."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

import fp8_compile
from fp8_compile.errors import PatternError, UnmatchedPatternWarning
from fp8_compile.patterns import Pattern
from fp8_compile.recipes import ENCODERS, RECIPES, recommended, table
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


@pytest.mark.parametrize("recipe", ENCODERS.values(), ids=lambda recipe: recipe.encoder)
def test_an_encoders_recipe_names_layers_that_it_has(recipe: Any) -> None:
    kind: Any = getattr(transformers, recipe.encoder)
    with torch.device("meta"):
        encoder = kind(kind.config_class()).bfloat16()
    linears = [path for path, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    for pattern in recommended(encoder):
        assert any(map(Pattern(pattern).matches, linears)), pattern
    assert recommended(encoder) == recipe.keep


@pytest.mark.parametrize("way", ["load", "compile"])
def test_a_text_encoder_keeps_what_its_recipe_says(way: str) -> None:
    torch._dynamo.reset()
    config = transformers.T5Config(d_model=64, d_kv=32, d_ff=128, num_heads=2, num_layers=1, vocab_size=32)
    model = transformers.T5EncoderModel(config).bfloat16().eval()
    if way == "load":
        fp8_compile.quantize_(model, OPTIONS)
    else:
        model.compile(backend="fp8_diffusion", options=COMPILED)
    with torch.no_grad():
        model(torch.arange(16).unsqueeze(0))
    assert kept(model) == {"encoder.block.0.layer.1.DenseReluDense.wo"}
    assert fp8_compile.report(model).totals["quantized"] == 5


def test_every_source_is_cited() -> None:
    said = " ".join(recipe.says for recipe in (*RECIPES.values(), *ENCODERS.values()))
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


def controlnet(transformer: Any) -> Any:
    """Of the same blocks, with another class around them, for which there is no recipe."""
    names = ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads")
    names += ("joint_attention_dim", "axes_dims_rope")
    made = diffusers.QwenImageControlNetModel(**{name: transformer.config[name] for name in names}).bfloat16().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    return made


@pytest.mark.parametrize("first", ["controlnet", "transformer", "block"])
def test_blocks_that_look_alike_are_told_apart(first: str) -> None:
    """One graph of Dynamo's serves all blocks that look alike, whatever is around them."""
    torch._dynamo.reset()
    tiny = MODELS["QwenImage"]
    model, inputs = tiny.build(), tiny.inputs(0)
    other = controlnet(model)
    for block in (*other.transformer_blocks, *model.transformer_blocks):  # type: ignore[misc, union-attr]
        block.compile(backend="fp8_diffusion", options=COMPILED, fullgraph=True)
    calls: dict[str, Any] = {
        "controlnet": lambda: other(**inputs, controlnet_cond=inputs["hidden_states"]),
        "transformer": lambda: model(**inputs),
    }
    if first == "block":
        seen: list[Any] = []
        hook = model.transformer_blocks[0].register_forward_pre_hook(  # type: ignore[index, union-attr]
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(**inputs)
        hook.remove()
        calls = {"block": lambda: model.transformer_blocks[0](*seen[0][0], **seen[0][1]), **calls}  # type: ignore[index, operator]
    calls = {first: calls.pop(first), **calls}

    def run() -> list[Any]:
        again = [call for name, call in calls.items() if name != "block"]
        return [call() for call in (*calls.values(), *again)]

    with torch.no_grad(), pytest.warns(UnmatchedPatternWarning, match="no recipe for"):
        run()
    alone = tiny.build()
    alone.compile_repeated_blocks(backend="fp8_diffusion", options=COMPILED, fullgraph=True)  # type: ignore[operator]
    with torch.no_grad():
        # Where a graph was made for other layers, it runs once as written; the call after that is compiled.
        (_, got), (_, expected) = ([tiny.output(m(**inputs)) for _ in range(2)] for m in (model, alone))
    assert torch.equal(got, expected)
    rows = {row.path: row.decision for row in fp8_compile.report(other).layers if is_img_mlp(row.path)}
    assert set(rows.values()) == {"quantized"}


@pytest.mark.parametrize("way", ["load", "compile"])
def test_several_models_in_one(way: str) -> None:
    both = nn.ModuleDict({"refiner": MODELS["ZImage"].build(), "transformer": MODELS["QwenImage"].build()})
    torch._dynamo.reset()
    assert recommended(both) == ("img_mlp",)
    tiny = MODELS["QwenImage"]
    if way == "load":
        fp8_compile.quantize_(both, OPTIONS)
    else:
        both.forward = lambda **inputs: both["transformer"](**inputs)
        both["transformer"].compile(backend="fp8_diffusion", options=COMPILED)
        with torch.no_grad():
            both(**tiny.inputs(0))
    rows = [row for row in fp8_compile.report(both).layers if is_img_mlp(row.path)]
    assert {row.decision for row in rows} == {"unquantized"}


def test_one_configuration_for_two_models(tmp_path: Path) -> None:
    for name, kind in (("QwenImage", "q"), ("Wan", "w"), ("ZImage", "z")):
        MODELS[name].build().save_pretrained(tmp_path / kind)  # type: ignore[operator]
    config = fp8_compile.Fp8DiffusionConfig(ignored_layers="recommended", min_features=16)
    kept_by = {}
    for kind, model in (
        ("q", diffusers.QwenImageTransformer2DModel),
        ("w", diffusers.WanTransformer3DModel),
        ("z", diffusers.ZImageTransformer2DModel),
    ):
        loaded: Any = model.from_pretrained(tmp_path / kind, quantization_config=config, torch_dtype=torch.bfloat16)
        loaded.save_pretrained(tmp_path / f"{kind}8")
        saved = json.loads((tmp_path / f"{kind}8" / "config.json").read_text())["quantization_config"]
        kept_by[kind] = saved.get("ignored_layers", [])
    assert kept_by == {"q": ["img_mlp"], "w": ["attn1", "attn2"], "z": []}
    assert config.ignored_layers == ["recommended"]  # type: ignore[attr-defined]


def test_a_pipeline_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, for example pipeline.transformer, got dict"):
        recommended({})  # type: ignore[arg-type]


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

    with (
        torch.no_grad(),
        pytest.warns(UnmatchedPatternWarning, match="no recipe for Model, and no repeated blocks are known"),
    ):
        convert()
    report = fp8_compile.report(model)
    assert report.totals["quantized"] > 0
    assert report.unmatched_patterns == (("recommended",) if way == "compile" else ())


class Framed(nn.Module):
    """A model that diffusers would compile block by block, and of which no recipe speaks."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = Model(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.inner(self.proj_in(x)))


@pytest.mark.parametrize("way", ["whole", "wrapped", "load"])
def test_without_a_recipe_what_is_outside_of_the_blocks_is_kept(way: str) -> None:
    torch._dynamo.reset()
    model = Framed().bfloat16().eval()
    run: Any = nn.Sequential(model) if way == "wrapped" else model
    if way == "load":
        assert recommended(model) == ("re:^proj_in$", "re:^proj_out$")
        fp8_compile.quantize_(model, OPTIONS)
    else:
        run.compile(backend="fp8_diffusion", options=COMPILED)
    with torch.no_grad():
        run(torch.randn(1, 16, WIDTH).bfloat16())
    found = fp8_compile.report(model)
    assert kept(model) == {"proj_in", "proj_out"}
    assert found.totals["quantized"] == 8
    assert found.unmatched_patterns == ()
    if way != "load":
        assert {row.reason for row in found.layers if row.reason} == {
            "ignored_layers: recommended: outside of the repeated blocks"
        }


def test_a_recipe_that_keeps_nothing_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnmatchedPatternWarning)
        fp8_compile.quantize_(model := MODELS["ZImage"].build(), OPTIONS)
    assert kept(model) == set()


def test_another_word_is_still_no_list() -> None:
    with pytest.raises(PatternError, match=r"'recomended': expected a list of patterns, .* or 'recommended'"):
        fp8_compile.Fp8Options(ignored_layers="recomended")  # type: ignore[arg-type]
