"""The engine over pipelines that are compiled, and what it checks before it is ready."""

from __future__ import annotations

import dataclasses
import queue
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_compile.errors import NothingConvertedError
from fp8_compile.measure.quality import psnr
from fp8_compile.pipelines.adapters import Adapters, Lora
from fp8_compile.pipelines.denoisers import PipelineError
from fp8_compile.pipelines.previews import PreviewError, Previews
from fp8_compile.pipelines.session import Session
from fp8_compile.serve.engine import Engine
from fp8_compile.serve.orders import Event, Order, Picture
from tests.support.lora_files import write_lora
from tests.support.serving import MODEL, PROMPT, WatchedSession, serving

pytestmark = pytest.mark.pipeline

LORA_TARGETS = ("attention.to_q", "attn.to_q", "attn.to_v")
OTHERS = ("two small blue squares on a yellow background", "three green crosses on a black background")


def drawn(engine: Engine, *orders: Order) -> list[Picture]:
    """The pictures of all orders, which are queued at once."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for order in orders:
        engine.submit(order, events.put)
    found = [events.get(timeout=120) for order in orders for _ in order.seeds]
    for event in found:
        assert isinstance(event, Picture), event
    return sorted((e for e in found if isinstance(e, Picture)), key=lambda p: p.seed)


@pytest.mark.parametrize("model", ["embedded:qwen-image", pytest.param("embedded:z-image", marks=pytest.mark.slow)])
def test_after_the_warm_up_nothing_recompiles_and_batches_are_equal_to_rounding(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sizes nor texts, batches or adapters."""

    def load() -> Session:
        session = Session.load(model, at_load={"strict": True})
        names = {"small": 4, "large": 8}
        transformer = session.pipe.transformer
        files = {
            n: write_lora(transformer, tmp_path / f"{n}.safetensors", r, r, LORA_TARGETS) for n, r in names.items()
        }
        session = dataclasses.replace(session, adapters=Adapters(session.pipe, files, at_once=2))
        session.compile({"inner_backend": "eager"}, dynamic=True)
        return WatchedSession(**{f.name: getattr(session, f.name) for f in dataclasses.fields(session)})

    told: list[tuple[int, int, str]] = []
    engine = Engine(load, warmup=[(64, 64)], max_batch=3, on_progress=lambda *what: told.append(what))
    engine.start().result(300)
    try:
        assert told[0] == (0, 3, "64x64 batch of 1")
        assert told[-1] == (3, 3, "done")
        assert engine.metrics.registry.get_sample_value("fp8_serve_compile_seconds_total") == 0
        # In the engine's thread: such settings are each thread's own.
        monkeypatch.setattr(
            WatchedSession, "before_call", lambda _: setattr(torch._dynamo.config, "error_on_recompile", True)
        )
        own = engine.session.arguments()
        alone = [drawn(engine, Order(p, (i,), own))[0].image for i, p in enumerate((PROMPT, *OTHERS))]
        together = drawn(engine, *(Order(p, (i,), own) for i, p in enumerate((PROMPT, *OTHERS))))
        for one, other in zip(alone, together, strict=True):
            assert psnr(one, other.image) > 45  # measured: 49 and more, of twelve each
        for size, count in (((96, 64), 1), ((128, 128), 3), ((32, 48), 2)):
            given = engine.session.arguments(width=size[0], height=size[1], num_inference_steps=2)
            pictures = drawn(engine, Order("x", tuple(range(count)), given), Order(" ".join(OTHERS), (9,), given))
            assert {picture.image.size for picture in pictures} == {size}
        small, large, weak = ("small", 1.0), ("large", 1.0), ("large", 0.5)
        sets: list[Lora] = [(small,), (large,), (), (large, small), (weak,), (weak, small)]
        adapted = [Order(PROMPT, (0,), own, lora=lora) for lora in sets]
        assert len({drawn(engine, order)[0].image.tobytes() for order in adapted}) == len(sets)
        assert engine.metrics.registry.get_sample_value("fp8_serve_compile_seconds_total") == 0
        # The worker may take the first picture before the others are there; the others were drawn together.
        assert engine.metrics.registry.get_sample_value("fp8_serve_batch_pictures_bucket", {"le": "1.0"}) < 15
        assert engine.metrics.registry.get_sample_value("fp8_serve_failures_total") == 0
        assert torch._dynamo.config.recompile_limit == 8  # as it was, outside of the engine
    finally:
        engine.close(10)


def test_a_preview_is_decoded_as_the_pipeline_decodes(session: WatchedSession) -> None:
    kept: list[torch.Tensor] = []

    def keep(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept.append(kwargs["latents"])
        return kwargs

    arguments = session.arguments(prompt=PROMPT, num_inference_steps=4)
    image = session.call(0, callback_on_step_end=keep, output_type="pt", **arguments).images
    previews = Previews(session.pipe)
    assert previews.refusal() is None
    assert torch.equal(previews.decode(kept[-1], **arguments), image)
    assert not torch.equal(previews.decode(kept[0], **arguments), image)
    again = session.call(0, callback_on_step_end=keep, output_type="pt", **arguments).images
    assert torch.equal(again, image)  # the twin leaves the pipeline as it was


def test_pipelines_without_previews_say_why() -> None:
    class Scheduler:
        init_noise_sigma = 14.6

    class Plain:
        scheduler = Scheduler()

    class Interruptible(Plain):
        interrupt = False

    assert Previews(Plain()).refusal() == "Plain has no property interrupt"
    assert Previews(Interruptible()).refusal() == "Scheduler scales the latents that it is given"


def test_a_pipeline_that_cannot_decode_between_steps_is_served_without_previews(
    session: WatchedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Previews, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        raise PreviewError("there are no latents")

    monkeypatch.setattr(Previews, "decode", broken)
    engine = Engine(lambda: session, max_batch=1)
    engine.start().result(60)
    assert engine.abilities.no_previews == "there are no latents"
    assert len(drawn(engine, Order(PROMPT, (0,), session.arguments(num_inference_steps=2)))) == 1
    engine.close(10)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"granularity": "tensor"}, "one scale for the whole batch"),
        ({"attention": "fp8-emulated"}, "attention in FP8 takes no mask"),
    ],
)
def test_pictures_that_would_depend_on_others_are_drawn_alone(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> Session:
        session = Session.load(MODEL, at_load=options)
        session.compile({**options, "inner_backend": "eager"}, dynamic=True)
        return session

    engine = Engine(load, max_batch=4)
    engine.start().result(300)
    engine.close(10)
    assert engine.max_batch == 1
    assert reason in caplog.text


def test_with_a_step_cache_pictures_are_drawn_alone_and_answers_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = Session.load(MODEL, quantized=False, cache="taylorseer-lite")
    with serving(
        WatchedSession(**{f.name: getattr(cached, f.name) for f in dataclasses.fields(cached)}), tmp_path
    ) as s:
        assert s.engine.max_batch == 1
        assert "the transformer has a step cache" in caplog.text
        answer = s.post({"prompt": PROMPT, "seed": 1, "n": 2}).json()
        assert answer["cache"] == "taylorseer-lite"
        assert s.post({"prompt": PROMPT, "seed": 2}).json()["data"][0]["b64_json"] == answer["data"][1]["b64_json"]
        for path in ("/health", "/ready"):
            assert s.get(path).json()["cache"] == "taylorseer-lite"
        stream = list(s.openai().images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 2}))
        assert stream[-1].b64_json == answer["data"][1]["b64_json"]
        assert stream[-1].cache == "taylorseer-lite"  # type: ignore[union-attr]


def test_a_pipeline_that_cannot_be_stopped_between_steps_is_refused(session: WatchedSession) -> None:
    class Unstoppable:
        def __call__(self, prompt: str, height: int, width: int, num_inference_steps: int, generator: Any) -> None:
            pass

    engine = Engine(lambda: dataclasses.replace(session, pipe=Unstoppable()))
    with pytest.raises(PipelineError, match="Unstoppable takes no output_type, callback_on_step_end"):
        engine.start().result(20)


def test_nothing_converted_is_an_error_at_load() -> None:
    with pytest.raises(NothingConvertedError):
        Session.load(MODEL, at_load={"strict": True, "min_features": 100_000})


def test_a_model_in_fp8_on_disk_keeps_its_weights(tmp_path: Any) -> None:
    Session.load(MODEL, at_load={"ignored_layers": ["img_mlp"]}).pipe.save_pretrained(tmp_path)
    session = Session.load(str(tmp_path), at_load={"strict": True})
    session.compile({"inner_backend": "eager"})
    session.call(0, **session.arguments(prompt=PROMPT, width=64, height=64, num_inference_steps=2))
    report = session.reports()["transformer"]
    kept = {row.path for row in report.layers if row.decision == "unquantized"}
    assert kept == {"img_in", "proj_out", *(row.path for row in report.layers if "img_mlp" in row.path)}
