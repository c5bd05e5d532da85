"""What pipelines decode: pixels as pictures, and the sound of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


@dataclass(frozen=True)
class Sound:
    """Of a video.

    Attributes:
        samples: ``(samples, channels)``, int16.
        rate: samples per second.
    """

    samples: NDArray[np.int16]
    rate: int


def has_finite_sound(made: Any) -> bool:
    """Whether no sound that a call returned has NaN or Inf."""
    waves: Tensor | None = getattr(made, "audio", None)
    return waves is None or bool(waves.isfinite().all())


def sounds_of(made: Any, pipe: Any) -> list[Sound | None]:
    """The sound of each video that a call of ``pipe`` made (LTX-2); None where there is none.

    Args:
        made: what the call returned. Its ``audio`` is ``(batch, channels, samples)``, in [-1, 1].
    """
    waves: Tensor | None = getattr(made, "audio", None)
    if waves is None:
        return [None] * len(made.frames)
    samples = (waves.float().cpu().clamp(-1, 1).mT * 32767).round().short().numpy()
    return [Sound(each, int(pipe.vocoder.config.output_sampling_rate)) for each in samples]


def to_image(pixels: Tensor) -> Image:
    """A picture of ``(3, height, width)`` in [0, 1], rounded as diffusers does."""
    from PIL import Image

    return Image.fromarray(to_bytes(pixels))


def to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """Of ``(..., 3, height, width)`` in [0, 1], the colors last."""
    colors_last = (pixels.float().cpu().movedim(-3, -1) * 255).round().byte()
    return cast("NDArray[np.uint8]", colors_last.numpy())
