"""``POST /v1/images/edits``, over pipelines of the embedded one's parts that take a picture."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from fp8_compile.measure.quality import psnr
from tests.support.serving import PROMPT, Served, WatchedSession, decoded, serving

pytestmark = pytest.mark.pipeline


def served_with(session: WatchedSession, pipeline: str, folder: Any) -> Any:
    import diffusers

    pipe: Any = getattr(diffusers, pipeline)(**session.pipe.components)
    made = WatchedSession("DIR", pipe, "cpu", {"transformer": pipe.transformer})
    return serving(made, folder, warmup=[(64, 64)])


@pytest.fixture(scope="module")
def edited(session: WatchedSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with(session, "QwenImageImg2ImgPipeline", tmp_path_factory.mktemp("pictures")) as made:
        yield made


@pytest.fixture(scope="module")
def inpainted(session: WatchedSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with(session, "QwenImageInpaintPipeline", tmp_path_factory.mktemp("pictures")) as made:
        yield made


@pytest.fixture(scope="module")
def circle(session: WatchedSession) -> bytes:
    return png(session.call(0, **session.arguments(prompt=PROMPT)).images[0])


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def edit(served: Served, image: Any, **fields: Any) -> Any:
    body = {"num_inference_steps": 8, "seed": 0, **fields.pop("extra_body", {})}
    return served.openai().images.edit(image=image, prompt=PROMPT, extra_body=body, **fields)


def test_an_edit_starts_from_the_picture(edited: Served, circle: bytes) -> None:
    given = Image.open(io.BytesIO(circle)).convert("RGB")
    session = edited.engine.session
    for strength in (0.3, 0.9):
        arguments = session.arguments(
            prompt=PROMPT, image=given, strength=strength, width=64, height=64, num_inference_steps=8
        )
        direct = session.call(5, **arguments).images[0]
        item = edit(edited, circle, extra_body={"strength": strength, "seed": 5}).data[0]
        assert decoded(item.b64_json).tobytes() == direct.tobytes()
    answer = edit(edited, ("name.png", circle), n=2, output_format="jpeg", user="me")
    assert [item.model_extra["seed"] for item in answer.data] == [0, 1]
    assert decoded(answer.data[0].b64_json).format == "JPEG"
    assert (answer.size, answer.safety_identifier) == ("64x64", "me")
    assert answer.usage.input_tokens_details.image_tokens == 2 * 16


def test_an_edit_streams_with_events_of_its_own(edited: Served, circle: bytes) -> None:
    async def ask() -> list[Any]:
        async with edited.async_openai() as client:
            stream = await client.images.edit(image=[circle], prompt=PROMPT, stream=True, partial_images=2)
            return [event async for event in stream]

    events = asyncio.run(ask())
    assert [event.type for event in events] == [*2 * ["image_edit.partial_image"], "image_edit.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    assert decoded(events[-1].b64_json).size == (64, 64)


def test_the_size_is_the_pictures_own_unless_asked(edited: Served, circle: bytes) -> None:
    image = Image.open(io.BytesIO(circle)).resize((100, 50))
    assert edit(edited, png(image)).size == "96x48"
    assert edit(edited, png(image), size="32x32").size == "32x32"


def test_a_transparent_part_of_the_mask_is_drawn_anew(inpainted: Served, circle: bytes) -> None:
    given = Image.open(io.BytesIO(circle)).convert("RGB")
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = inpainted.openai().images.edit(
        image=circle, mask=png(mask), prompt="a blue square", extra_body={"strength": 1.0, "seed": 3}
    )
    assert answer.data is not None
    drawn = decoded(answer.data[0].b64_json)
    left, right = (0, 0, 28, 64), (36, 0, 64, 64)
    assert psnr(given.crop(right), drawn.crop(right)) > psnr(given.crop(left), drawn.crop(left)) + 5
    body = {"strength": 1.0, "seed": 3}
    answer = inpainted.openai().images.edit(image=circle, prompt="a blue square", extra_body=body)
    assert answer.data is not None
    whole = decoded(answer.data[0].b64_json)
    assert psnr(given.crop(right), whole.crop(right)) < psnr(given.crop(right), drawn.crop(right))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"extra_body": {"foo": "1"}}, "foo", "unknown parameter 'foo'; valid: prompt, model,"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"extra_body": {"n": "two"}}, "n", "valid integer"),
        ({"input_fidelity": "high"}, "input_fidelity", "leave it out"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"extra_body": {"strength": 2}}, "strength", "less than or equal to 1"),
        ({"svg": {"model": "x"}}, "svg[model]", "unknown parameter 'svg[model]'"),
        ({"image": b"no picture"}, "image", "image is no picture in PNG, WebP or JPEG"),
        ({"image": png(Image.new("1", (8192, 4096)))}, "image", "8192x4096 pixels: at most 16777216"),
        ({"image": 2 * [png(Image.new("RGB", (64, 64)))]}, "image", "2 images: QwenImageImg2ImgPipeline takes one"),
        ({"mask": png(Image.new("RGB", (64, 64)))}, "mask", "the mask has no transparency"),
        (
            {"mask": png(Image.new("RGBA", (32, 64)))},
            "mask",
            "the mask has (32, 64) pixels, and the first image (64, 64)",
        ),
        ({"mask": png(Image.new("RGBA", (64, 64)))}, "mask", "QwenImageImg2ImgPipeline takes no mask_image"),
        ({"markup": b"x"}, "markup", "'markup' is no field for a file; there are image, image[], mask"),
    ],
)
def test_what_is_not_honoured_is_refused_and_named(
    edited: Served, circle: bytes, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        edit(edited, **{"image": circle, **fields})
    assert refused.value.param == param
    assert message in refused.value.message


def test_fields_of_the_installed_client_are_all_known() -> None:
    from openai.types import image_edit_params

    from fp8_compile.serve.protocol import FILES, EditRequest

    known = {
        *image_edit_params.ImageEditParamsBase.__annotations__,
        *image_edit_params.ImageEditParamsStreaming.__annotations__,
    }
    assert known <= {*EditRequest.model_fields, *FILES[EditRequest]}


def test_forms_that_are_none(edited: Served, circle: bytes) -> None:
    url = f"{edited.url}/v1/images/edits"
    for how, message in (
        ({"json": {"prompt": PROMPT}}, "expected a form with files"),
        ({"data": {"prompt": PROMPT}, "files": {"mask": circle}}, "image is missing"),
        ({"files": {"image": circle}}, "prompt is missing"),
        ({"data": {"prompt": PROMPT, "image": "text"}, "files": {"image": circle}}, "expected a file, got a text"),
    ):
        answer = httpx.post(url, **how)  # type: ignore[arg-type]
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    many = [("image[]", ("a.png", circle))] * 18
    assert httpx.post(url, data={"prompt": PROMPT}, files=many).json()["error"]["type"] == "invalid_request_error"


def test_each_kind_of_pipeline_says_what_it_is_for(served: Served, edited: Served, circle: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match="draws from texts alone: QwenImagePipeline takes no image"):
        edit(served, circle)
    with pytest.raises(openai.BadRequestError, match="edits pictures"):
        edited.draw()
