"""Pipelines that are loaded, compiled and called: what is refused, and whose fault an error is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import fp8_compile
from fp8_compile.errors import NothingConvertedError, OptionError
from fp8_compile.pipelines.call_rules import CallError
from fp8_compile.pipelines.denoisers import PipelineError
from fp8_compile.pipelines.session import Session

pytestmark = pytest.mark.pipeline

PICTURE = {"prompt": "a red circle", "num_inference_steps": 2, "height": 64, "width": 64}


@pytest.fixture
def session() -> Session:
    """Of a random Qwen-Image pipeline."""
    from bench.tiny import build_qwen_image

    pipe: Any = build_qwen_image()
    pipe.set_progress_bar_config(disable=True)
    return Session("DIR", pipe, "cpu", {"transformer": pipe.transformer})


@pytest.fixture(scope="module")
def z_image() -> Session:
    return Session.load("embedded:z-image")


def test_a_directory_is_loaded_compiled_and_called(tmp_path: Path) -> None:
    from bench.tiny import build_qwen_image

    build_qwen_image().save_pretrained(tmp_path)
    session = Session.load(str(tmp_path), device="cpu")
    session.compile({"inner_backend": "eager", "ignored_layers": ["img_mlp"]})
    steps: list[int] = []

    def step(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append(index)
        return kwargs

    arguments = session.arguments(**PICTURE, negative_prompt=None)
    first, again, other = (session.call(s, callback_on_step_end=step, **arguments).images[0] for s in (0, 0, 1))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert steps == [0, 1] * 3
    assert session.reports()["transformer"].totals["quantized"] == 24


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dtype": "float8"}, OptionError, "dtype='float8' is not valid; valid: bfloat16, float16, float32"),
        ({"dtype": "float32"}, OptionError, "use one of those"),
        ({"model": "embedded:flux"}, OptionError, "no embedded pipeline is called 'flux'"),
        ({"model": "no/such/model"}, PipelineError, "model='no/such/model' could not be loaded on device='cpu'"),
        ({"device": "nowhere"}, PipelineError, "could not be loaded on device='nowhere'"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(given: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Session.load(**{"model": "embedded:qwen-image", "device": "cpu", **given})  # type: ignore[arg-type]


def test_an_embedded_pipeline_has_arguments_of_its_own(z_image: Session) -> None:
    own = {"height": 64, "width": 64, "num_inference_steps": 8, "guidance_scale": 0.0}
    assert z_image.arguments(prompt="a", height=None) == {"prompt": "a", **own}
    assert z_image.arguments(height=32)["height"] == 32
    assert "guidance_scale" not in z_image.arguments(negative_prompt="green")  # it would be ignored


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"true_cfg_scale": 4.0}, "true_cfg_scale=4 needs a negative_prompt"),
        ({"true_cfg_scale": 1.0, "negative_prompt": "x"}, "is no guidance, but negative_prompt needs some"),
        ({"guidance_scale": 0.0, "negative_prompt": "x"}, "is no guidance, but negative_prompt needs some"),
        ({"guidance_scale": 4.0}, r"this QwenImageTransformer2DModel takes none \(no guidance_embeds\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: expected a finite number"),
        ({"strength": 1.0}, "QwenImagePipeline takes no strength; it takes prompt, "),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(session: Session, given: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError, match=message):
        session.arguments(prompt="a", **given)


def test_what_a_pipeline_refuses_is_an_error_of_the_call(session: Session, z_image: Session) -> None:
    session.compile({"inner_backend": "eager"})
    block = session.pipe.transformer.transformer_blocks[0]
    compiled = block._compiled_call_impl
    for of, wrong, message in (
        (z_image, {"height": 40}, "Height must be divisible by 16"),  # refused in __call__
        (session, {"prompt": None}, "Provide either `prompt` or"),  # in check_inputs
        (session, {"sigmas": [1.0], "num_inference_steps": None, "max_sequence_length": 2048}, "max_sequence_length"),
    ):
        with pytest.raises(CallError, match=message) as error:
            of.call(0, **{**PICTURE, **wrong})
        assert type(error.value.__cause__) is ValueError
    assert block._compiled_call_impl is compiled
    session.check_call(**PICTURE)
    assert session.call(0, **PICTURE).images[0].size == (64, 64)


def test_an_error_of_a_step_is_not_blamed_on_the_arguments(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("deep inside")

    monkeypatch.setattr(session.pipe.transformer, "forward", broken)
    with pytest.raises(ValueError, match="deep inside") as error:
        session.call(0, **PICTURE)
    assert type(error.value) is ValueError


def test_a_mode_marks_the_steps_of_cuda_graphs(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    # What is compiled does not matter here.
    monkeypatch.setattr(type(session.pipe.transformer), "compile_repeated_blocks", lambda *_, **__: None)
    for mode, count in ((None, 0), ("reduce-overhead", 2)):
        session.compile_unquantized(mode=mode)
        session.call(0, **PICTURE)
        assert len(marks) == count


def test_fp8_weights_are_not_drawn_as_unquantized(session: Session) -> None:
    fp8_compile.quantize_(session.pipe.transformer)
    with pytest.raises(PipelineError, match="the transformer of model='DIR' has FP8 weights, so it has no unquantized"):
        session.compile_unquantized()


def test_a_pipeline_of_which_nothing_became_fp8_is_an_error(session: Session) -> None:
    session = dataclasses.replace(session, model="other")
    session.compile({"inner_backend": "eager", "min_features": 100_000})
    with pytest.warns(fp8_compile.NothingConvertedWarning):
        session.call(0, **PICTURE)
    with pytest.raises(NothingConvertedError, match="no layer of the model was quantized: "):
        session.reports()
