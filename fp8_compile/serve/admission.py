"""A request that is well-formed becomes an order for the engine, or a refusal that names the field."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..pipelines.adapters import Lora
from ..pipelines.call_rules import CallError
from .orders import Abilities, Order
from .pictures import parse_size
from .protocol import (
    ALIASES,
    LARGEST_SEED,
    QUALITIES,
    ApiError,
    DrawingRequest,
    PictureRequest,
    VideoRequest,
    bad_value,
)

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_SIDE = 16_383
"""What WebP can hold."""

SEVERAL_IMAGES = ("QwenImageEditPlusPipeline", "Flux2Pipeline", "Flux2KleinPipeline")
"""Pipelines that draw one picture from several."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        sizes: ``(width, height)``, the first is the one for ``size="auto"``; none: any of up to ``pixels`` pixels.
        steps: denoising steps, at most.
        frames: of a video, at most.
    """

    sizes: Sequence[tuple[int, int]] = ()
    pixels: int = 4 * 1024 * 1024
    steps: int = 100
    frames: int = 257


@dataclass(frozen=True)
class Admitted:
    """An order, and what its answer says of it beside the pictures.

    Attributes:
        quality: the name to answer with; None where the request gave a number of steps.
        text_tokens: of the prompts of one picture.
        given_tokens: of the pictures that were given, at their own sizes.
        cache: of steps, that is on.
    """

    order: Order
    quality: str | None
    output_format: str
    compression: int | None
    text_tokens: int
    given_tokens: int
    safety_identifier: str | None
    cache: str | None


@dataclass(frozen=True)
class AdmittedVideo:
    """An order for one video, and what is known of it before it is made.

    Attributes:
        fps: frames of a second.
        size: width and height; None where the pipeline alone knows its usual one. ``frames`` likewise.
        cache: of steps, that is on.
    """

    order: Order
    fps: int
    size: tuple[int, int] | None
    frames: int | None
    cache: str | None


class Admission:
    """Knows what a pipeline can be asked for.

    Args:
        abilities: of the engine that has the pipeline.
        model: the name that requests may give.
        usual_size: for ``size="auto"`` without ``limits.sizes``; None: the pipeline's own.
        steps: the usual number; None: the pipeline's own.
    """

    def __init__(
        self,
        abilities: Abilities,
        model: str,
        limits: Limits,
        usual_size: tuple[int, int] | None = None,
        steps: int | None = None,
    ) -> None:
        self._abilities = abilities
        self._rules = abilities.rules
        self._model = model
        self._limits = limits
        self._usual_size = limits.sizes[0] if limits.sizes else usual_size
        defaults = self._rules.defaults
        own = self._rules.arguments()
        self._steps: int = steps or own.get("num_inference_steps", defaults["num_inference_steps"])
        # A copy, since none is for two threads at once.
        self._counting = threading.Lock()
        self._tokenizer: Any = copy.deepcopy(abilities.tokenizer)
        longest = getattr(self._tokenizer, "model_max_length", None)
        limits_of_text = [each for each in (longest, defaults.get("max_sequence_length")) if isinstance(each, int)]
        self._text_limit = min(limits_of_text, default=None)
        tokenizer: Any = self._tokenizer
        if self._text_limit is not None and getattr(tokenizer, "chat_template", None):
            # Some pipelines count these beside the prompt's. Better a refusal too many than a text that is cut off.
            empty = [{"role": "user", "content": ""}]
            text = tokenizer.apply_chat_template(empty, tokenize=False, add_generation_prompt=True)
            self._text_limit -= len(tokenizer(text).input_ids)

    def admit(
        self, request: PictureRequest, client: str, images: Sequence[Image] = (), mask: Image | None = None
    ) -> Admitted:
        """The order that ``request`` asks for.

        Args:
            images: that an edit starts from.
            mask: see `fp8_compile.serve.edits.Edit`.

        Raises:
            ApiError: what it asks for cannot be had.
        """
        if self._rules.makes_videos:
            message = f"the model makes videos ({self._rules.pipeline}): POST /v1/videos"
            raise ApiError(400, message, None, "no_pictures")
        self._check_model(request.model)
        self._check_combinations(request)
        self._check_images(images)
        size = self._size(request.size, images[0] if images else None)
        steps, quality = self._steps_of(request)
        arguments = self._arguments(
            request,
            steps,
            size,
            strength=getattr(request, "strength", None),
            image=(images[0] if len(images) == 1 else list(images)) if images else None,
            mask_image=self._mask(images, mask),
        )
        n = request.n or 1
        first = _seed(request)
        if first + n - 1 > LARGEST_SEED:
            raise bad_value("seed", f"seed={first}: with n={n}, the last seed is above {LARGEST_SEED}")
        order = Order(
            prompt=request.prompt,
            seeds=tuple(range(first, first + n)),
            arguments=arguments,
            previews=request.partial_images or 0,
            lora=self._lora(request.lora),
            client=client,
            unquantized=self._unquantized(request.unquantized),
        )
        return Admitted(
            order,
            quality,
            request.output_format or "png",
            request.output_compression,
            self._tokens_of(request),
            sum(image.width * image.height for image in images) // self._abilities.multiple**2,
            request.safety_identifier or request.user or None,
            self._abilities.cache,
        )

    def admit_video(self, request: VideoRequest, client: str, image: Image | None = None) -> AdmittedVideo:
        """The video that ``request`` asks for.

        Args:
            image: that it shall begin with.

        Raises:
            ApiError: what it asks for cannot be had.
        """
        rules = self._rules
        if not rules.makes_videos:
            message = f"the model draws pictures ({rules.pipeline}): POST /v1/images/generations"
            raise ApiError(400, message, None, "no_videos")
        self._check_model(request.model)
        if image is not None and "image" not in rules.defaults:
            message = f"the model makes videos from texts alone: {rules.pipeline} takes no image"
            raise bad_value("input_reference", message)
        if image is None and self._abilities.needs_image:
            message = f"{rules.pipeline} begins with a picture: send one as input_reference"
            raise ApiError(400, message, "input_reference", "image_needed")
        size = self._size(_size_of_video(request), image)
        steps = self._steps if request.num_inference_steps is None else self._bounded(request.num_inference_steps)
        rate, fps = rules.rate, request.fps or rules.usual_fps
        frames = self._frames(request, fps)
        timing: dict[str, Any] = {"num_frames": frames} if rate is None else {"num_frames": frames, rate: fps}
        arguments = self._arguments(
            request, steps, size, image=image, guidance_scale_2=request.guidance_scale_2, **timing
        )
        self._tokens_of(request)
        lora = self._lora(request.lora)
        unquantized = self._unquantized(request.unquantized)
        order = Order(request.prompt, (_seed(request),), arguments, 0, lora, client, unquantized)
        own = rules.defaults
        if size is None and isinstance(own["width"], int) and isinstance(own["height"], int):
            size = (own["width"], own["height"])
        return AdmittedVideo(order, fps, size, frames or own["num_frames"], self._abilities.cache)

    def _arguments(
        self, request: DrawingRequest, steps: int, size: tuple[int, int] | None, **others: Any
    ) -> dict[str, Any]:
        """Of the pipeline's call."""
        given = {
            "num_inference_steps": steps,
            "width": None if size is None else size[0],
            "height": None if size is None else size[1],
            "guidance_scale": request.guidance_scale,
            "true_cfg_scale": request.true_cfg_scale,
            "negative_prompt": request.negative_prompt,
            **others,
        }
        try:
            return self._rules.arguments(**given)
        except CallError as error:
            param = "mask" if error.argument == "mask_image" else error.argument
            raise ApiError(400, str(error), param, "invalid_value") from error

    def _frames(self, request: VideoRequest, fps: int) -> int | None:
        """How many; None for the pipeline's own number."""
        multiple = self._abilities.frame_multiple
        if request.num_frames is None:
            if request.seconds is None:
                return None
            parts = round(request.seconds * fps / (multiple or 1))
            frames = parts if multiple is None else max(1, parts) * multiple + 1
            param, given = (
                "seconds",
                f"seconds={request.seconds:g}: at {fps} fps that is {frames} frames, and there are",
            )
        else:
            frames = request.num_frames
            param, given = "num_frames", f"num_frames={frames}: there are"
            if request.seconds is not None:
                raise bad_value("seconds", "seconds and num_frames both set the length; leave one out")
            # Pipelines would make fewer without a word.
            if multiple is not None and (frames % multiple != 1 or frames == 1):
                near = max(1, round((frames - 1) / multiple)) * multiple + 1
                message = f"num_frames={frames}: expected a multiple of {multiple} and one more, such as {near}"
                raise bad_value("num_frames", message)
        if frames > self._limits.frames:
            raise bad_value(param, f"{given} at most {self._limits.frames}")
        return frames

    def _check_model(self, asked: str | None) -> None:
        if asked is not None and asked != self._model:
            message = f"there is no model {asked!r}; this server has {self._model!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def _check_combinations(self, request: PictureRequest) -> None:
        if request.stream:
            if (request.n or 1) > 1:
                raise bad_value("n", f"n={request.n}: a stream has one picture; events do not say which one is meant")
            if request.response_format == "url":
                raise bad_value("response_format", "response_format='url': events of a stream hold b64_json")
        if request.partial_images:
            if not request.stream:
                raise bad_value("partial_images", f"partial_images={request.partial_images} needs stream=true")
            if self._abilities.no_previews is not None:
                raise bad_value("partial_images", f"no partial images here: {self._abilities.no_previews}")
        if request.output_compression not in (None, 100) and (request.output_format or "png") == "png":
            message = f"output_compression={request.output_compression}: only webp and jpeg lose anything"
            raise bad_value("output_compression", message)

    def _check_images(self, images: Sequence[Image]) -> None:
        pipe = self._rules.pipeline
        if images and "image" not in self._rules.defaults:
            raise bad_value("image", f"the model draws from texts alone: {pipe} takes no image")
        if not images and self._abilities.needs_image:
            raise ApiError(400, f"the model edits pictures ({pipe}): POST /v1/images/edits", "image", "image_needed")
        if len(images) > 1 and pipe not in SEVERAL_IMAGES:
            raise bad_value("image", f"{len(images)} images: {pipe} takes one")

    def _lora(self, asked: dict[str, float] | None) -> Lora:
        names, at_once = self._abilities.adapters, self._abilities.adapters_at_once
        for name in asked or {}:
            if name not in names:
                raise bad_value("lora", f"lora: there is no adapter {name!r}; valid: {', '.join(names) or 'none'}")
        if asked and len(asked) > at_once:
            raise bad_value("lora", f"lora: {len(asked)} adapters, and this server takes {at_once} at once")
        return tuple(sorted((asked or {}).items()))

    def _unquantized(self, asked: bool | None) -> bool:
        if asked and len(self._abilities.weights) == 1:
            raise bad_value("unquantized", "unquantized=true: this server has no unquantized twin (serve --compare)")
        return bool(asked)

    def _mask(self, images: Sequence[Image], mask: Image | None) -> Image | None:
        """``mask``; without one, all of the picture changes, also by pipelines that need a mask."""
        if mask is None and images and "mask_image" in self._rules.defaults:
            from PIL import Image

            return Image.new("L", images[0].size, 255)
        return mask

    def _size(self, asked: str | None, given: Image | None) -> tuple[int, int] | None:
        """Width and height; None for the pipeline's own. By default that of the picture that is ``given``, if any."""
        multiple = self._abilities.multiple
        if asked in (None, "auto"):
            if given is None or self._limits.sizes:
                return self._usual_size
            asked = "x".join(str(max(1, side // multiple) * multiple) for side in given.size)
        size = parse_size(str(asked))
        if size is None:
            raise bad_value("size", f"size={asked!r}: expected 'auto', or width and height such as '1024x1024'")
        if self._limits.sizes:
            if size not in self._limits.sizes:
                valid = ", ".join(f"{width}x{height}" for width, height in self._limits.sizes)
                raise bad_value("size", f"size={asked!r} is not served; valid: auto, {valid}")
        elif size[0] % multiple or size[1] % multiple:
            raise bad_value("size", f"size={asked!r}: expected multiples of {multiple}")
        elif max(size) > LONGEST_SIDE:
            raise bad_value("size", f"size={asked!r}: at most {LONGEST_SIDE} pixels on a side")
        elif size[0] * size[1] > self._limits.pixels:
            raise bad_value("size", f"size={asked!r}: at most {self._limits.pixels} pixels")
        return size

    def _steps_of(self, request: PictureRequest) -> tuple[int, str | None]:
        """How many steps, and the quality to answer with."""
        if request.num_inference_steps is None:
            asked = request.quality or "auto"
            quality = ALIASES.get(asked, asked)
            return max(1, round(self._steps * QUALITIES[quality])), quality
        if request.quality not in (None, "auto"):
            raise bad_value("quality", "quality and num_inference_steps both set the steps; leave one out")
        return self._bounded(request.num_inference_steps), None

    def _bounded(self, steps: int) -> int:
        """``steps``, which a request asks for."""
        if steps > self._limits.steps:
            raise bad_value("num_inference_steps", f"num_inference_steps={steps}: at most {self._limits.steps}")
        return steps

    def _tokens_of(self, request: DrawingRequest) -> int:
        """Of all texts of a request."""
        prompt = self._text_tokens("prompt", request.prompt)
        return prompt + self._text_tokens("negative_prompt", request.negative_prompt or "")

    def _text_tokens(self, param: str, text: str) -> int:
        """How many tokens ``text`` has, which are not more than the pipeline reads."""
        if self._tokenizer is None or not text:
            return 0
        with self._counting:
            tokens = len(self._tokenizer(text, verbose=False).input_ids)
        if self._text_limit is not None and tokens > self._text_limit:
            raise bad_value(param, f"{param} has {tokens} tokens: at most {self._text_limit} are read")
        return tokens


def _seed(request: DrawingRequest) -> int:
    return secrets.randbelow(2**32) if request.seed is None else request.seed


def _size_of_video(request: VideoRequest) -> str | None:
    """``size``, or what stands for it."""
    given = (request.width, request.height)
    if given == (None, None):
        return request.size
    if None in given:
        missing = "width" if request.width is None else "height"
        raise ApiError(400, f"{missing} is missing", missing, "missing_required_parameter")
    if request.size is not None:
        raise bad_value("size", "size says the same as width and height; leave one out")
    return f"{request.width}x{request.height}"
