"""The embedded pipeline: trained weights that draw what a prompt says, random ones for whoever needs no picture."""

from __future__ import annotations

import random
from typing import Any

import torch

from fp8_compile.quality import draw, following
from fp8_compile.scenes import SIZE, scenes
from fp8_compile.tiny import build_qwen_image, default_pipeline_dir

LARGEST_FILE = 10 * 1024 * 1024


def test_random_weights_depend_on_the_seed_alone_and_leave_the_callers_random_state() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_qwen_image(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in ("transformer", "vae", "text_encoder"):
        mine, same, different = (getattr(pipe, name).state_dict() for pipe in (first, again, other))
        assert all(torch.equal(mine[key], same[key]) for key in mine)
        assert not all(torch.equal(mine[key], different[key]) for key in mine)


def test_the_embedded_pipeline_is_the_class_and_the_size_of_the_random_one() -> None:
    embedded, built = _embedded(), build_qwen_image()
    for name in ("transformer", "vae", "text_encoder"):
        mine, theirs = getattr(embedded, name), getattr(built, name)
        assert type(mine) is type(theirs)
        assert {k: v.shape for k, v in mine.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        assert mine.dtype == torch.bfloat16
    assert embedded.tokenizer.get_vocab() == built.tokenizer.get_vocab()


def test_files_of_the_embedded_pipeline_are_small() -> None:
    files = [path for path in default_pipeline_dir().rglob("*") if path.is_file()]
    assert "model_index.json" in {path.name for path in files}
    assert max(path.stat().st_size for path in files) < LARGEST_FILE


def _embedded() -> Any:
    from diffusers import QwenImagePipeline

    pipe: Any = QwenImagePipeline.from_pretrained(default_pipeline_dir(), dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_embedded_pipeline_draws_held_out_captions() -> None:
    captions = [scene.caption for scene in random.Random(1).sample([s for s in scenes() if s.held_out], 24)]
    drawn = draw(_embedded(), captions, (0,), height=SIZE, width=SIZE, num_inference_steps=8)
    found = following(drawn)
    # Measured 14 of 24. Colours and backgrounds are nearly always right.
    assert found["all"][0] >= 10, found
    assert found["background"] == (24, 24), found
    assert found["color"][0] >= 20, found
