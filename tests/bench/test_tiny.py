"""The embedded pipelines: trained weights that draw what a prompt says, random ones for whoever needs no picture."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch

from bench.outliers import load
from bench.tiny import build_qwen_image, build_z_image
from fp8_compile.embedded import EMBEDDED_CALLS, default_pipeline_dir
from fp8_compile.errors import NotInstalledError, OptionError
from fp8_compile.measure.quality import generate, prompt_adherence
from fp8_compile.measure.scenes import scenes

pytestmark = pytest.mark.pipeline

LARGEST_FILE = 10 * 1024 * 1024


BUILD: dict[str, Any] = {"qwen-image": build_qwen_image, "z-image": build_z_image}


def test_the_random_z_image_draws_a_picture_that_depends_on_the_prompt() -> None:
    pipe: Any = build_z_image()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 0}
    one, other = (
        pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images[0]
        for prompt in ("a red circle on a white background", "two blue squares on a yellow background")
    )
    assert one.size == (64, 64)
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize("name", BUILD)
def test_random_weights_depend_on_the_seed_alone_and_leave_the_callers_random_state(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (BUILD[name](seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for part in ("transformer", "vae", "text_encoder"):
        mine, same, different = (getattr(pipe, part).state_dict() for pipe in (first, again, other))
        assert all(torch.equal(mine[key], same[key]) for key in mine)
        assert not all(torch.equal(mine[key], different[key]) for key in mine)


@pytest.mark.parametrize("name", EMBEDDED_CALLS)
def test_an_embedded_pipeline_is_the_class_and_the_size_of_the_random_one(name: str) -> None:
    embedded, built = load(name), BUILD[name]()
    assert type(embedded) is type(built)
    for part in ("transformer", "vae", "text_encoder"):
        mine, theirs = getattr(embedded, part), getattr(built, part)
        assert type(mine) is type(theirs)
        assert {k: v.shape for k, v in mine.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        assert mine.dtype == torch.bfloat16
    assert embedded.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert embedded.tokenizer.chat_template == built.tokenizer.chat_template


@pytest.mark.parametrize("name", EMBEDDED_CALLS)
def test_files_of_an_embedded_pipeline_are_small(name: str) -> None:
    files = [path for path in default_pipeline_dir(name).rglob("*") if path.is_file()]
    assert "model_index.json" in {path.name for path in files}
    assert max(path.stat().st_size for path in files) < LARGEST_FILE


def test_a_pipeline_that_is_not_embedded_is_refused_with_those_that_are() -> None:
    with pytest.raises(OptionError, match="'flux'; there are qwen-image, z-image"):
        default_pipeline_dir("flux")


def test_an_embedded_pipeline_that_is_not_installed_is_refused_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fp8_compile_embedded", None)
    with pytest.raises(NotInstalledError, match="pip install fp8-compile-embedded, or in a checkout: pip install -e"):
        default_pipeline_dir("z-image")


@pytest.mark.parametrize(("name", "least"), [("qwen-image", 23), ("z-image", 23)])
def test_an_embedded_pipeline_draws_held_out_captions(name: str, least: int) -> None:
    captions = [scene.caption for scene in random.Random(1).sample([s for s in scenes() if s.held_out], 24)]
    found = prompt_adherence(generate(load(name), captions, (0,), **EMBEDDED_CALLS[name]))
    assert found["all"][0] >= least, found
    assert found["background"] == (24, 24), found
