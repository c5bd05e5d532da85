"""Decoded pixels as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


def to_image(pixels: Tensor) -> Image:
    """A picture of ``(3, height, width)`` in [0, 1], rounded as diffusers does."""
    from PIL import Image

    return Image.fromarray(to_bytes(pixels))


def to_bytes(pixels: Tensor) -> NDArray[np.uint8]:
    """Of ``(..., 3, height, width)`` in [0, 1], the colors last."""
    colors_last = (pixels.float().cpu().movedim(-3, -1) * 255).round().byte()
    return cast("NDArray[np.uint8]", colors_last.numpy())
