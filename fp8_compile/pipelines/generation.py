"""Pictures and videos of one call, with the seconds of each phase; what is not finite or black is an error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Fp8Error
from .pixels import Sound, has_finite_sound, sounds_of
from .session import Session

OnStep = Callable[[int, int], None]
"""Called after each step with how many are done, and how many there are."""


class BrokenPictureError(Fp8Error, RuntimeError):
    """A picture that is not finite, or black all over.

    Attributes:
        phase: which made it: "encode", "denoise" or "decode".
    """

    def __init__(self, phase: str, problem: str) -> None:
        super().__init__(problem)
        self.phase = phase


@dataclass(frozen=True)
class Generation:
    """What came of a call.

    Attributes:
        pixels: on the CPU, in [0, 1]: ``(batch, 3, height, width)``, of videos ``(batch, frames, 3, height, width)``.
        seconds: of "encode", "denoise" and "decode", with what was compiled meanwhile.
        sounds: of each video, or None; of pictures empty.
    """

    pixels: Tensor
    seconds: dict[str, float]
    sounds: Sequence[Sound | None]


def generate(
    session: Session,
    seeds: Sequence[int],
    on_step: OnStep,
    also: Callable[..., Any],
    **arguments: Any,
) -> Generation:
    """Draw together what ``arguments["prompt"]`` lists.

    Args:
        seeds: one for each prompt.
        also: a further ``callback_on_step_end``, such as `StepClock.step`.
        **arguments: see `Session.arguments`.

    Raises:
        BrokenPictureError: one is not finite or black all over.
        CallError: the pipeline refuses the arguments.
    """
    watch = _Watch(session, on_step, also)
    encoders = [m for n, m in vars(session.pipe).items() if n.startswith("text_encoder") and isinstance(m, nn.Module)]
    hooks = [encoder.register_forward_hook(watch.encoded) for encoder in encoders]
    start = time.perf_counter()
    try:
        made = session.call(seeds, **arguments, callback_on_step_end=watch.step, output_type="pt")
    finally:
        for hook in hooks:
            hook.remove()
    shown = made.frames if session.rules.makes_videos else made.images
    pixels: Tensor = shown.float().cpu()  # waits for the device
    end = time.perf_counter()
    watch.check(pixels, getattr(made, "nsfw_content_detected", None))
    if not has_finite_sound(made):
        raise BrokenPictureError("decode", "the sound of the video has NaN or Inf; try --dtype bfloat16")
    sounds = sounds_of(made, session.pipe) if session.rules.makes_videos else ()
    encoded = watch.encode_end or start
    denoised = max(watch.denoise_end or encoded, encoded)
    seconds = {"encode": encoded - start, "denoise": denoised - encoded, "decode": end - denoised}
    return Generation(pixels, seconds, sounds)


class _Watch:
    """Notes when phases end, and which of them first made numbers that are not finite."""

    def __init__(self, session: Session, on_step: OnStep, also: Callable[..., Any]) -> None:
        self._session = session
        self._on_step = on_step
        self._also = also
        self._bad_text = False
        self._bad_step: int | None = None
        self._steps = 0
        self.encode_end: float | None = None
        self.denoise_end: float | None = None

    def encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._steps == 0:
            self.encode_end = time.perf_counter()
        values = output.values() if hasattr(output, "values") else output if isinstance(output, tuple) else (output,)
        self._bad_text |= not all(_finite(value) for value in values if isinstance(value, Tensor))

    def step(self, pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = self._also(pipe, index, timestep, kwargs)
        self._steps = index + 1
        if self._bad_step is None and not _finite(kwargs["latents"]):
            self._bad_step = index + 1
        self.denoise_end = time.perf_counter()
        self._on_step(index + 1, pipe.num_timesteps)
        return kwargs

    def check(self, pixels: Tensor, unsafe: Any) -> None:
        """Raises `BrokenPictureError`."""
        black = any(not picture.any() for picture in pixels)
        if _finite(pixels) and not black:
            return
        if any(unsafe or ()):
            raise BrokenPictureError("decode", "black: the pipeline's safety checker took the picture away")
        if self._bad_text:
            raise BrokenPictureError(
                "encode",
                "the text encoder made NaN or Inf, so the picture is none; try --dtype bfloat16, and leave out "
                "--text-encoder-quantization",
            )
        if self._bad_step is not None and self._session.pipe.num_timesteps == 1:
            raise BrokenPictureError(
                "denoise",
                "denoising made NaN or Inf in its only step, which many schedulers cannot do; try --steps 2 or more",
            )
        if self._bad_step is not None:
            raise BrokenPictureError(
                "denoise",
                f"denoising made NaN or Inf in step {self._bad_step} of {self._session.pipe.num_timesteps}; try "
                "--no-quantization to see whether FP8 is the reason, then --ignored-layers, or --dtype bfloat16",
            )
        if black and _finite(pixels):
            raise BrokenPictureError(
                "decode",
                "the picture is black all over, though all its numbers are finite: the decoder was given what the "
                "model is not trained for; try more --steps, and the sizes and the scheduler of the model's own",
            )
        raise BrokenPictureError(
            "decode", "the decoder (VAE) made NaN or Inf of finite latents; many do in float16: try --dtype bfloat16"
        )


def _finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
