"""``POST /v1/images/generations``, as OpenAI's own client speaks it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fp8_compile.measure.quality import psnr
from tests.support.serving import MODEL, PROMPT, Served, WatchedSession, decoded, serving

pytestmark = pytest.mark.pipeline


def test_a_picture_is_the_pipelines_own(served: Served, session: WatchedSession) -> None:
    answer = served.openai().images.generate(
        prompt=PROMPT, model=MODEL, user="somebody", extra_body={"seed": 3, "num_inference_steps": 4}
    )
    arguments = session.arguments(prompt=PROMPT, num_inference_steps=4)
    direct = session.call(3, callback_on_step_end=lambda p, i, t, kwargs: kwargs, **arguments).images[0]
    assert answer.data is not None
    (extra,) = (item.model_extra or {} for item in answer.data)
    assert extra.pop("seconds") > 0
    assert extra == {"seed": 3}
    assert decoded(answer.data[0].b64_json).tobytes() == direct.tobytes()
    assert decoded(answer.data[0].b64_json).format == "PNG"
    assert (answer.size, answer.output_format, answer.background, answer.quality) == ("64x64", "png", "opaque", None)
    assert answer.safety_identifier == "somebody"
    assert answer.usage is not None
    # 64 x 64 pixels are 4 x 4 tokens; the prompt's words are one token each.
    assert (answer.usage.input_tokens_details.text_tokens, answer.usage.output_tokens) == (7, 16)
    assert (answer.usage.input_tokens, answer.usage.total_tokens) == (7, 23)


def test_each_of_n_pictures_has_a_seed_that_draws_it_again(served: Served) -> None:
    together = served.draw(n=3, seed=10)
    assert [item.seed for item in together] == [10, 11, 12]
    (alone,) = served.draw(seed=11)
    first, second = decoded(together[0].b64_json), decoded(together[1].b64_json)
    # Measured: 54 dB and more for pictures drawn alone and in a batch.
    assert psnr(second, decoded(alone.b64_json)) > 48
    assert psnr(first, second) < 48


def test_without_a_seed_each_picture_is_another_and_says_how_to_draw_it(served: Served) -> None:
    (one,), (two,) = served.draw(), served.draw()
    assert one.b64_json != two.b64_json
    (again,) = served.draw(seed=one.seed)
    assert again.b64_json == one.b64_json


def test_who_asks_at_once_is_drawn_together_and_gets_ones_own(served: Served) -> None:
    prompts = [PROMPT, "two small blue squares on a yellow background", "a green cross on a black background"] * 2

    async def ask() -> list[Any]:
        async with served.async_openai() as client:
            return await asyncio.gather(
                *(client.images.generate(prompt=p, extra_body={"seed": i}) for i, p in enumerate(prompts))
            )

    batches = served.metric("batch_pictures_count")
    together = [decoded(answer.data[0].b64_json) for answer in asyncio.run(ask())]
    assert served.metric("batch_pictures_count") - batches < len(prompts)
    for i, prompt in enumerate(prompts):
        (alone,) = served.draw(prompt, seed=i)
        assert psnr(decoded(alone.b64_json), together[i]) > 48, prompt


def test_previews_come_closer_to_the_picture(served: Served) -> None:
    stream = served.openai().images.generate(
        prompt=PROMPT, stream=True, partial_images=3, quality="medium", extra_body={"seed": 1}
    )
    events = list(stream)
    assert [event.type for event in events] == 3 * ["image_generation.partial_image"] + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    *previews, last = (decoded(event.b64_json) for event in events)
    distances = [psnr(last, preview) for preview in previews]
    assert distances == sorted(distances)
    assert distances[-1] < 60
    assert {(event.size, event.output_format, event.quality) for event in events} == {("64x64", "png", "medium")}
    completed = events[-1]
    assert completed.type == "image_generation.completed"
    assert completed.usage.output_tokens == 16
    (whole,) = served.draw(seed=1)
    assert whole.b64_json == completed.b64_json


def test_a_stream_of_the_asynchronous_client_and_what_it_is_on_the_wire(served: Served) -> None:
    async def ask() -> list[Any]:
        async with served.async_openai() as client:
            stream = await client.images.generate(prompt=PROMPT, stream=True, output_format="webp")
            return [event async for event in stream]

    (completed,) = asyncio.run(ask())
    assert decoded(completed.b64_json).format == "WEBP"
    answer = served.post({"prompt": PROMPT, "stream": True, "partial_images": 1})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.splitlines() if line]
    assert [line for line in lines if not line.startswith("data: ")] == [
        "event: image_generation.partial_image",
        "event: image_generation.completed",
    ]
    assert [json.loads(line[6:])["type"] for line in lines if line.startswith("data: ")] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]


def test_more_previews_than_steps_are_as_many_as_there_are(served: Served) -> None:
    stream = served.openai().images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"num_inference_steps": 2}
    )
    assert [event.type.split(".")[1] for event in stream] == ["partial_image", "completed"]


def test_formats_and_compression(served: Served) -> None:
    def size(**given: Any) -> int:
        (item,) = served.draw(seed=0, num_inference_steps=2, **given)
        assert decoded(item.b64_json).format == given["output_format"].upper()
        return len(item.b64_json)

    jpeg = [size(output_format="jpeg", output_compression=each) for each in (10, 50, None)]
    assert jpeg == sorted(set(jpeg))
    webp = [size(output_format="webp", output_compression=each) for each in (0, 100, None)]
    assert webp[0] < webp[1] == webp[2]
    assert size(output_format="png", output_compression=100) == size(output_format="png")


def test_an_address_leads_to_the_picture(served: Served) -> None:
    body = {"seed": 5, "num_inference_steps": 2, "output_format": "jpeg"}
    (inline,), (linked,) = served.draw(**body), served.draw(**body, response_format="url")
    assert linked.b64_json is None
    fetched = httpx.get(linked.url)
    assert fetched.headers["content-type"] == "image/jpeg"
    assert fetched.content == base64.b64decode(inline.b64_json)
    assert httpx.get(linked.url[:-9] + "0000.jpeg").status_code == 404


def test_sizes_and_qualities(served: Served) -> None:
    client = served.openai()
    steps = []
    asked: Any = (("low", "auto"), ("medium", "32x48"), ("standard", "64x64"), ("hd", "32x32"), ("max", "32x32"))
    for quality, size in asked:
        before = served.metric("steps_total")
        answer = client.images.generate(prompt=PROMPT, quality=quality, size=size)
        steps.append(served.metric("steps_total") - before)
        assert answer.data is not None
        width, height = decoded(answer.data[0].b64_json).size
        assert f"{width}x{height}" == answer.size == ("64x64" if size == "auto" else size)
        assert answer.quality == {"standard": "medium", "hd": "high"}.get(quality, quality)
    assert steps == [4, 8, 8, 12, 24]


def test_guidance_reaches_the_pipeline(served: Served) -> None:
    given: list[dict[str, Any]] = [{}, {"negative_prompt": "green", "true_cfg_scale": 4.0}, {"negative_prompt": "blue"}]
    assert len({served.draw(seed=0, **more)[0].b64_json for more in given}) == 3


NEUTRAL = {
    "model": MODEL,
    "n": 1,
    "size": "auto",
    "quality": "auto",
    "output_format": "png",
    "output_compression": 100,
    "response_format": "b64_json",
    "stream": False,
    "partial_images": 0,
    "background": "auto",
    "moderation": "auto",
    "user": "x",
    "safety_identifier": "y",
}
NULL = dict.fromkeys([*NEUTRAL, "style", "complexity", "frame_count", "svg", "seed", "negative_prompt"])


@pytest.mark.parametrize("fields", [NEUTRAL, NULL], ids=["neutral", "null"])
def test_fields_that_ask_for_nothing_are_accepted(served: Served, fields: dict[str, Any]) -> None:
    answer = served.post({"prompt": PROMPT, **fields, "num_inference_steps": 2})
    assert answer.status_code == 200, answer.text
    assert answer.json().get("safety_identifier") == fields["safety_identifier"]


REFUSED = [
    ({"foo": 1}, "foo", "unknown parameter 'foo'; valid: prompt, model, size,"),
    ({"prompt": None}, "prompt", "prompt=None: Input should be a valid string"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": "x" * 32_001}, "prompt", "at most 32000 characters"),
    ({"prompt": "blue " * 600}, "prompt", "tokens: at most 512 are read"),
    ({"n": 0}, "n", "n=0: Input should be greater than or equal to 1"),
    ({"n": 11}, "n", "less than or equal to 10"),
    ({"n": "2"}, "n", "n='2': Input should be a valid integer"),
    ({"n": 2, "stream": True}, "n", "a stream has one picture"),
    ({"size": "big"}, "size", "size='big': expected 'auto', or width and height such as '1024x1024'"),
    ({"size": "65x64"}, "size", "expected multiples of 16"),
    ({"size": "8192x8192"}, "size", "at most 4194304 pixels"),
    ({"size": "16x16400"}, "size", "at most 16383 pixels on a side"),
    ({"quality": "best"}, "quality", "'auto', 'low', 'medium', 'high'"),
    ({"quality": "low", "num_inference_steps": 3}, "quality", "both set the steps"),
    ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
    ({"num_inference_steps": 101}, "num_inference_steps", "num_inference_steps=101: at most 100"),
    ({"output_format": "gif"}, "output_format", "'png', 'webp' or 'jpeg'"),
    ({"output_format": "svg"}, "output_format", "'png', 'webp' or 'jpeg'"),
    ({"output_compression": 50}, "output_compression", "only webp and jpeg"),
    ({"output_compression": 101, "output_format": "webp"}, "output_compression", "less than or equal to 100"),
    ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
    ({"moderation": "low"}, "moderation", "Input should be 'auto'"),
    ({"style": "vivid"}, "style", "style='vivid': this server does not do that; leave it out"),
    ({"complexity": "high"}, "complexity", "leave it out"),
    ({"frame_count": 9}, "frame_count", "leave it out"),
    ({"frame_duration_ms": 100}, "frame_duration_ms", "leave it out"),
    ({"svg": {"model": "x"}}, "svg", "leave it out"),
    ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
    ({"partial_images": 1}, "partial_images", "needs stream=true"),
    ({"response_format": "url", "stream": True}, "response_format", "events of a stream hold b64_json"),
    ({"response_format": "png"}, "response_format", "'b64_json' or 'url'"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**64 - 1, "n": 2}, "seed", "the last seed is above"),
    ({"guidance_scale": 4.0}, "guidance_scale", "takes none (no guidance_embeds)"),
    ({"true_cfg_scale": 4.0}, "true_cfg_scale", "needs a negative_prompt"),
    ({"true_cfg_scale": "4"}, "true_cfg_scale", "valid number"),
    ({"lora": {"style": 1.0}}, "lora", "there is no adapter 'style'; valid: none"),
    ({"lora": {"style": "1"}}, "lora", "valid number"),
    ({"user": 7}, "user", "valid string"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=[str(given)[:50] for given, _, _ in REFUSED])
def test_what_is_not_honoured_is_refused_and_named(
    served: Served, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        served.openai().images.generate(**{"prompt": PROMPT, "extra_body": fields})
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert message in refused.value.message
    assert refused.value.request_id is not None


def test_previews_of_a_pipeline_without_are_refused(
    served: Served, session: WatchedSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = dataclasses.replace(served.engine.abilities, no_previews="the pipeline hides its latents")
    monkeypatch.setattr(served.engine, "_abilities", without)
    with (
        serving(session, tmp_path, engine=served.engine) as hidden,
        pytest.raises(openai.BadRequestError, match="no partial images here: the pipeline hides its latents"),
    ):
        list(hidden.openai().images.generate(prompt=PROMPT, stream=True, partial_images=1))


def test_fields_of_the_installed_client_are_all_known(served: Served) -> None:
    """A new release of the client may send new ones."""
    from openai.types import image_generate_params

    from fp8_compile.serve.protocol import GenerationRequest

    known = {
        *image_generate_params.ImageGenerateParamsBase.__annotations__,
        *image_generate_params.ImageGenerateParamsStreaming.__annotations__,
    }
    assert known <= GenerationRequest.model_fields.keys()


def test_a_model_that_is_not_served(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        served.openai().images.generate(prompt=PROMPT, model="gpt-image-2")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


def test_models(served: Served) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-2")
