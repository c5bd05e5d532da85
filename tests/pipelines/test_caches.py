"""Step caches by name: which pipelines can have which, and that each picture begins without the steps of another."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import fp8_compile
from fp8_compile.errors import OptionError
from fp8_compile.pipelines.caches import CACHES, enable_cache
from fp8_compile.pipelines.denoisers import PipelineError, denoisers_of
from fp8_compile.pipelines.previews import Previews
from fp8_compile.pipelines.session import Session
from tests.support import zoo_all

pytestmark = pytest.mark.pipeline

TEXT = "a large red circle on the left of a white background, and beside it a smaller one"
MODEL = "embedded:qwen-image"


def picture(session: Session, step: Any = lambda pipe, index, timestep, kwargs: kwargs) -> torch.Tensor:
    arguments = session.arguments(prompt=TEXT, num_inference_steps=8)
    drawn: torch.Tensor = session.call(0, callback_on_step_end=step, output_type="pt", **arguments).images
    return drawn


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return picture(Session.load(MODEL, quantized=False))


@pytest.mark.parametrize("name", sorted(CACHES.keys() - {"text-kv"}))
def test_each_cache_draws_and_forgets_the_steps_of_a_picture_that_was_left(name: str, plain: torch.Tensor) -> None:
    session = Session.load(MODEL, quantized=False, cache=name)
    first = picture(session)
    previews = Previews(session.pipe)

    def look_and_leave(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        previews.decode(kwargs["latents"], **session.arguments(prompt=TEXT))
        if index == 4:
            raise InterruptedError
        return kwargs

    def look(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        previews.decode(kwargs["latents"], **session.arguments(prompt=TEXT))
        return kwargs

    with pytest.raises(InterruptedError):
        picture(session, look_and_leave)
    assert torch.equal(picture(session), first)
    assert torch.equal(picture(session, look), first)  # a preview leaves the cache alone
    # These two skip nothing in so few steps of this pipeline.
    assert torch.equal(first, plain) == (name in ("first-block", "sea"))


def test_keys_and_values_of_the_text_are_computed_once() -> None:
    """For NucleusMoE alone. It skips nothing but what would be the same again, so no value changes, in FP8 either."""
    name = "NucleusMoEImageTransformer2DModel"
    inputs = zoo_all.inputs(name)
    others = {**inputs, "encoder_hidden_states": torch.randn_like(inputs["encoder_hidden_states"])}
    pipe = diffusers.NucleusMoEImagePipeline.__new__(diffusers.NucleusMoEImagePipeline)

    def drawn(cache: bool) -> list[torch.Tensor]:
        model: Any = zoo_all.build(name).requires_grad_(False)
        if cache:
            enable_cache("text-kv", pipe, {"transformer": model})
        model.compile_repeated_blocks(backend="fp8_diffusion", options={"inner_backend": "eager", "min_features": 64})
        with torch.no_grad():
            results = [model(**given)[0] for given in (inputs, inputs, others)]
            model.transformer_blocks[0].encoder_proj.weight.zero_()
            assert torch.equal(model(**inputs)[0], results[0]) == cache  # it is not computed again
        assert fp8_compile.report(model).totals["quantized"] > 30
        return results

    with torch._dynamo.config.patch(recompile_limit=64):  # a graph for each state of the cache
        plain, cached = drawn(False), drawn(True)
    assert all(map(torch.equal, plain, cached))
    assert not torch.equal(plain[1], plain[2])


def test_a_pipeline_is_compiled_with_its_cache_and_all_its_layers_in_fp8() -> None:
    session = Session.load(MODEL, at_load={"strict": True}, cache="taylorseer-lite")
    session.compile({"inner_backend": "eager"}, dynamic=True)
    assert torch.equal(picture(session), picture(session))
    assert session.reports()["transformer"].totals["quantized"] == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("teacache", f"cache='teacache' is not valid; valid: {', '.join(CACHES)}"),
        ("cache-dit", "cache='cache-dit' is not offered: it has to be told whether a call guides"),
        ("mag", "cache='mag' is not offered: it needs ratios that were measured with one checkpoint"),
    ],
)
def test_names_that_no_pipeline_can_have(name: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Session.load("no/such/model", cache=name)


def test_pipelines_that_cannot_have_a_cache_say_why() -> None:
    with pytest.raises(PipelineError, match=r"tells its transformer nothing of the steps \(no cache_context\)"):
        Session.load("embedded:z-image", quantized=False, cache="first-block")
    with pytest.raises(PipelineError, match="ZImagePipeline does not tell its current timestep"):
        Session.load("embedded:z-image", quantized=False, cache="pyramid")


def test_a_cache_that_would_do_nothing_is_refused() -> None:
    from tests.support.pipelines import build_wan

    for name in ("taylorseer", "text-kv"):
        wan = build_wan()
        message = f"cache='{name}': it finds none of its layers in WanTransformer3DModel, so it would do nothing"
        with pytest.raises(PipelineError, match=message):
            enable_cache(name, wan, denoisers_of(wan))
    del wan.transformer.blocks[:]
    with pytest.raises(PipelineError, match="cache='first-block': WanTransformer3DModel cannot have it"):
        enable_cache("first-block", wan, denoisers_of(wan))
