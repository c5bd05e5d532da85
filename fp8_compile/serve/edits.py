"""Forms: texts as in a JSON body, and pictures, which are not trusted."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from .protocol import FILES, ApiError, EditRequest, VideoRequest, bad_value, refusal

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURES_GIVEN = 16
MAX_GIVEN_PIXELS = 2**24
"""Of each picture. A small file can hold a huge one."""


@dataclass(frozen=True)
class Edit:
    """A form that is well-formed.

    Attributes:
        images: in RGB, as their cameras were held.
        mask: white where the first image shall change, in the mode "L" of Pillow.
    """

    request: EditRequest
    images: tuple[Image, ...]
    mask: Image | None


async def read_edit(form: FormData) -> Edit:
    """The edit that ``form`` asks for.

    Raises:
        ApiError: a field is unknown, missing or not valid.
    """
    return await run_in_threadpool(_edit, *await _parts(form, EditRequest))


async def read_video(form: FormData) -> tuple[VideoRequest, Image | None]:
    """The video that ``form`` asks for, and the picture that it shall begin with.

    Raises:
        ApiError: a field is unknown, missing or not valid.
    """
    return await run_in_threadpool(_video, *await _parts(form, VideoRequest))


async def _parts(form: FormData, model: type[BaseModel]) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The texts and the files of ``form``, which should be a ``model``."""
    texts: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {name.removesuffix("[]"): [] for name in FILES[model]}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in FILES[model]:
                message = f"{name!r} is no field for a file; there are {', '.join(FILES[model])}"
                raise ApiError(400, message, name, "invalid_value")
            files[name.removesuffix("[]")].append(await value.read())
        elif name in texts:
            raise bad_value(name, f"{name} is given twice")
        elif nested := re.fullmatch(r"lora\[(.+)\]", name):
            texts.setdefault("lora", {})[nested[1]] = value
        elif name.partition("[")[0] in files:
            raise bad_value(name, f"{name}: expected a file, got a text")
        else:
            texts[name] = value
    return texts, files


def _video(texts: dict[str, Any], files: dict[str, list[bytes]]) -> tuple[VideoRequest, Image | None]:
    """See `read_video`."""
    try:
        request = VideoRequest.model_validate(texts)
    except ValidationError as error:
        raise refusal(VideoRequest, error.errors()) from error
    given = files["input_reference"]
    if len(given) > 1:
        raise bad_value("input_reference", f"{len(given)} pictures: a video begins with one")
    return request, _picture("input_reference", given[0]).convert("RGB") if given else None


def _edit(texts: dict[str, Any], files: dict[str, list[bytes]]) -> Edit:
    """See `read_edit`; large pictures take a while."""
    try:
        request = EditRequest.model_validate(texts)
    except ValidationError as error:
        raise refusal(EditRequest, error.errors()) from error
    if not files["image"]:
        raise ApiError(400, "image is missing", "image", "missing_required_parameter")
    if len(files["image"]) > MAX_PICTURES_GIVEN:
        raise bad_value("image", f"{len(files['image'])} images: at most {MAX_PICTURES_GIVEN}")
    if len(files["mask"]) > 1:
        raise bad_value("mask", "mask is given twice")
    images = tuple(_picture("image", content).convert("RGB") for content in files["image"])
    masks = [_mask(content) for content in files["mask"]]
    if masks and masks[0].size != images[0].size:
        raise bad_value("mask", f"the mask has {masks[0].size} pixels, and the first image {images[0].size}")
    return Edit(request, images, masks[0] if masks else None)


def _picture(param: str, content: bytes) -> Image:
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "WEBP", "JPEG"))
        if image.width * image.height > MAX_GIVEN_PIXELS:
            raise bad_value(
                param, f"{param} has {image.width}x{image.height} pixels: at most {MAX_GIVEN_PIXELS} in all"
            )
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # whatever broken files lead to
        raise bad_value(param, f"{param} is no picture in PNG, WebP or JPEG") from error
    return ImageOps.exif_transpose(image)


def _mask(content: bytes) -> Image:
    """Transparent is where OpenAI's clients want a change, and white where diffusers makes one."""
    from PIL import ImageOps

    mask = _picture("mask", content)
    if "A" not in mask.getbands():
        raise bad_value("mask", "the mask has no transparency, which says where to change the image")
    return ImageOps.invert(mask.getchannel("A"))
