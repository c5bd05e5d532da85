"""What requests, answers and errors look like: OpenAI's Images and Videos APIs, as its Python client 3.57 speaks them.

A field that is not known, or that asks for what this server does not do, is an error that names it. A field that is
null counts as not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_PICTURES = 10
MAX_PROMPT = 32_000
LARGEST_SEED = 2**64 - 1

QUALITIES = {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0}
"""How many of the usual number of steps each quality takes."""

ALIASES = {"auto": "medium", "standard": "medium", "hd": "high"}
"""Other names of qualities, the neutral one and those of retired models."""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape.

    Attributes:
        status: of HTTP.
        param: the field that is to blame.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_value(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that blames a field."""
    return ApiError(400, message, param, code)


def _refuse(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "this server does not do that; leave it out")


Unsupported = Annotated[None, BeforeValidator(_refuse)]
Text = Annotated[str, Field(max_length=MAX_PROMPT)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class DrawingRequest(BaseModel):
    """What all requests hold; from ``seed`` on it is this server's own."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    model: str | None = None
    size: str | None = None

    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = None
    negative_prompt: Text | None = None
    lora: dict[str, Number] | None = None
    unquantized: bool | None = None


class PictureRequest(DrawingRequest):
    """What both kinds of requests for pictures hold."""

    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    complexity: Unsupported = None
    frame_count: Unsupported = None
    frame_duration_ms: Unsupported = None
    svg: Unsupported = None


class GenerationRequest(PictureRequest):
    """The body of ``POST /v1/images/generations``."""

    model_config = ConfigDict(strict=True)

    moderation: Literal["auto"] | None = None
    style: Unsupported = None


class EditRequest(PictureRequest):
    """The texts of the form of ``POST /v1/images/edits``; its files are ``image`` or ``image[]``, and ``mask``."""

    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    input_fidelity: Unsupported = None
    markup: Unsupported = None


def _not_in_form(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("file", "expected a file, in a form (multipart/form-data)")


InForm = Annotated[None, BeforeValidator(_not_in_form)]


def _seconds(value: object) -> object:
    """As a number: OpenAI's client sends a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise PydanticCustomError("seconds", "expected a number of seconds") from None


class VideoRequest(DrawingRequest):
    """The body of ``POST /v1/videos``, as JSON or as a form, whose only file is ``input_reference``."""

    input_reference: InForm = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    seconds: Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)] | None = None
    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[int, Field(ge=1, le=120)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    guidance_scale_2: Number | None = None


FILES: dict[type[BaseModel], tuple[str, ...]] = {
    EditRequest: ("image", "image[]", "mask"),
    VideoRequest: ("input_reference",),
}
"""Fields of the forms that hold files."""


def refusal(model: type[BaseModel], errors: Sequence[Any]) -> ApiError:
    """Of pydantic's ``errors`` about a body that should have been a ``model``, the first, as a 400."""
    error = errors[0]
    where = [str(part) for part in error["loc"] if part != "body"]
    param, kind = (where[0] if where else None), error["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {error['ctx']['error']}", code="invalid_json")
    if param is None:
        return ApiError(400, "expected a JSON object in the body, sent as application/json", code="invalid_json")
    if kind == "extra_forbidden":
        valid = ", ".join(dict.fromkeys((*model.model_fields, *FILES.get(model, ()))))
        return ApiError(400, f"unknown parameter {param!r}; valid: {valid}", param, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    given = repr(error["input"])
    given = given if len(given) <= 80 else f"{given[:80]}..."
    code = "unsupported_parameter" if kind == "unsupported" else "invalid_value"
    return ApiError(400, f"{param}={given}: {error['msg']}", param, code)


class InputTokens(BaseModel):
    """Tokens of what a request brings."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens of the prompts as the tokenizer counts them, and of the pictures as the transformer sees them."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, text: int, given: int, pictures: int) -> Usage:
        """Of ``text`` tokens of all prompts, and tokens of the pictures that were ``given`` and that were drawn."""
        return cls(
            input_tokens=text + given,
            input_tokens_details=InputTokens(text_tokens=text, image_tokens=given),
            output_tokens=pictures,
            total_tokens=text + given + pictures,
        )


class ImageItem(BaseModel):
    """A picture, as base64 or as an address.

    Attributes:
        seed: draws it again.
        seconds: that its batch took, without waiting.
    """

    b64_json: str | None = None
    url: str | None = None
    seed: int
    seconds: float


class ImagesResponse(BaseModel):
    """The answer with all pictures.

    Attributes:
        quality: null where the request gave a number of steps.
        cache: the step cache that was on; null without.
    """

    created: int
    background: Literal["opaque"] = "opaque"
    data: list[ImageItem]
    output_format: str
    quality: str | None
    size: str
    safety_identifier: str | None
    cache: str | None
    usage: Usage


class _ImageEvent(BaseModel):
    """What every event of a stream has."""

    b64_json: str
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str
    size: str


class PartialImageEvent(_ImageEvent):
    """A preview in a stream."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(_ImageEvent):
    """The last event of a stream."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    seed: int
    seconds: float
    safety_identifier: str | None
    cache: str | None
    usage: Usage


class VideoError(BaseModel):
    """Why there is no video; as in `ApiError`."""

    code: str | None
    message: str
    param: str | None


class VideoJob(BaseModel):
    """A video that is made, or was.

    Attributes:
        progress: percent of the denoising steps; 100 once it can be fetched.
        seconds, size, num_frames: null until the first is made, where the pipeline alone knows its usual ones.
        expires_at: when it is forgotten; null while it is made.
        seed: draws it again.
        cache: the step cache that is on; null without.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str | None
    size: str | None
    error: VideoError | None
    remixed_from_video_id: None = None
    seed: int
    num_frames: int | None
    fps: int
    cache: str | None


class VideoList(BaseModel):
    """``GET /v1/videos``."""

    object: Literal["list"] = "list"
    data: list[VideoJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """``DELETE /v1/videos/ID``."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    """The model that is served."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "fp8-compile"


class State(BaseModel):
    """``GET /health`` and ``GET /ready``.

    Attributes:
        cache: the step cache that is on.
        weights: what they are in the denoisers, such as "FP8", and in their twin, if there is one.

    Both are null until it is ready.
    """

    status: str
    cache: str | None
    weights: tuple[str, ...] | None


class Models(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]
