"""Recognise the scenes of `scenes` in a picture. Needs ``pip install 'fp8-compile[quality]'``."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .scenes import ATTRIBUTES, COLORS, EXTENTS, OUTLINES, SIZE, Scene

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_LEAST_AREA = 16  # in pixels; the smallest shape has about 100
_CONTRAST = 45.0  # distance in RGB between background and shape; the nearest two of COLORS are 103 apart
_TEMPLATE = 16


@dataclass(frozen=True)
class Detection:
    """What a picture shows; an attribute is None where nothing was recognised or the shapes differ in it."""

    count: int
    shape: str | None
    color: str | None
    background: str
    size: str | None
    position: str | None

    def follows(self, scene: Scene) -> dict[str, bool]:
        """Per attribute that the caption of ``scene`` decides, whether it is as the caption says."""
        verdict = {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}
        if scene.position is None:
            del verdict["position"]
        return verdict


def detect(image: Image) -> Detection:
    """Recognise a scene: the border is the background, and each connected region that differs from it is a shape."""
    import numpy as np

    ndimage: Any = import_module("scipy.ndimage")

    pixels: Any = np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    # Relative to the strongest, so that the rims of two close shapes do not join them.
    labels, found = ndimage.label(contrast > max(_CONTRAST, 0.4 * float(contrast.max())))
    shapes, colors, sizes, centers = [], [], [], []
    for region in range(1, found + 1):
        inside = labels == region
        if inside.sum() < _LEAST_AREA:
            continue
        # The rim is a mixture with the background.
        core = ndimage.binary_erosion(inside)
        fill = np.median(pixels[core if core.any() else inside], axis=0)
        axis = fill - ground
        cover = np.clip((pixels - ground) @ axis / max(float(axis @ axis), 1.0), 0, 1)
        cover[~ndimage.binary_dilation(inside, iterations=2)] = 0
        if not (cover > 0.5).any():  # of no colour of its own, as noise is
            continue
        left, right, top, bottom = *_span(cover.max(axis=0)), *_span(cover.max(axis=1))
        shapes.append(_shape(cover, left, right, top, bottom))
        colors.append(_nearest(fill))
        sizes.append(_size(max(right - left, bottom - top)))
        centers.append(((left + right) / 2, (top + bottom) / 2))
    return Detection(
        count=len(shapes),
        shape=_common(shapes),
        color=_common(colors),
        background=_nearest(ground),
        size=_common(sizes),
        position=_position(*centers[0]) if len(centers) == 1 else None,
    )


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _nearest(color: np.ndarray[Any, Any]) -> str:
    return min(COLORS, key=lambda name: math.dist(COLORS[name], color))


def _span(profile: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Where a profile of coverage begins and ends, to a part of a pixel."""
    import numpy as np

    covered = np.flatnonzero(profile > 0.5)
    first, last = int(covered[0]), int(covered[-1])
    before = profile[first - 1] if first else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first + 1 - profile[first] - before, last + profile[last] + after


def _size(extent: float) -> str:
    bounds = list(EXTENTS.values())
    limits = [(low[1] + high[0]) / 2 for low, high in itertools.pairwise(bounds)]
    return list(EXTENTS)[sum(extent > limit for limit in limits)]


def _position(x: float, y: float) -> str:
    right, down = x - SIZE / 2, y - SIZE / 2
    if max(abs(right), abs(down)) < 8:
        return "center"
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "bottom" if down > 0 else "top"


def _shape(cover: np.ndarray[Any, Any], left: float, right: float, top: float, bottom: float) -> str | None:
    """The shape whose outline, stretched to the same box, overlaps ``cover`` best; None below 0.6."""
    import numpy as np

    seen = _stretched(cover, left, right, top, bottom)
    overlap = {
        name: max(float(np.minimum(seen, t).sum() / np.maximum(seen, t).sum()) for t in templates)
        for name, templates in _templates().items()
    }
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] > 0.6 else None


def _stretched(cover: np.ndarray[Any, Any], left: float, right: float, top: float, bottom: float) -> Any:
    """A box of ``cover``, resampled to _TEMPLATE x _TEMPLATE."""
    import numpy as np

    ndimage: Any = import_module("scipy.ndimage")
    steps = (np.arange(_TEMPLATE) + 0.5) / _TEMPLATE
    grid = np.meshgrid(top + steps * (bottom - top) - 0.5, left + steps * (right - left) - 0.5, indexing="ij")
    return ndimage.map_coordinates(cover, grid, order=1, mode="nearest")


@functools.cache
def _templates() -> dict[str, list[Any]]:
    """Each shape sharp and, since a small one may be all rounded corners, blurred."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    made: dict[str, list[Any]] = {}
    side = 8 * _TEMPLATE
    for name, outline in OUTLINES.items():
        picture = Image.new("L", (2 * side, 2 * side))
        ImageDraw.Draw(picture).polygon([((u + 1) * side, (v + 1) * side) for u, v in outline], fill=255)
        for blur in (0, 0.06, 0.12):
            cover = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur * side)), dtype=np.float32) / 255
            box = (*_span(cover.max(axis=0)), *_span(cover.max(axis=1)))
            made.setdefault(name, []).append(_stretched(cover, *box))
    return made
