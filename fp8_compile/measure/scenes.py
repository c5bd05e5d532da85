"""Simple scenes with captions: drawn, and recognised again in a picture.

The embedded pipeline is trained on such scenes, and whether a picture shows what its prompt says is decided by
`detect`, which knows these scenes and nothing else. Needs Pillow and numpy; `detect` needs scipy too
(``pip install 'fp8-compile[quality]'``).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import Fp8Error

if TYPE_CHECKING:
    import random

    import numpy as np
    from PIL.Image import Image

SIZE = 64
"""Height and width of a scene in pixels; every length below is in pixels of such a picture."""

COLORS = {
    "red": (205, 20, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 225, 60),
    "orange": (240, 115, 20),
    "purple": (140, 50, 180),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("one", "two", "three", "four")
EXTENTS = {"small": (14.0, 16.0), "medium": (20.0, 22.0), "large": (26.0, 28.0)}
"""Least and greatest width, which is also the height, of a shape of each size. A caption does not say "medium"."""
POSITIONS = {
    "center": ("in the center of", 0, 0),
    "left": ("on the left of", -1, 0),
    "right": ("on the right of", 1, 0),
    "top": ("at the top of", 0, -1),
    "bottom": ("at the bottom of", 0, 1),
}
"""How a caption says each position, and the direction of it from the center."""

ATTRIBUTES = ("count", "shape", "color", "size", "position", "background")

_OVERSAMPLING = 4
_ARM = 0.36  # width of an arm of a cross, as a part of the cross


class SceneError(Fp8Error, ValueError):
    """A caption that describes no scene, or attributes that no scene has."""


@dataclass(frozen=True)
class Scene:
    """``count`` like shapes on a plain background; ``position`` only for a single one, None: anywhere.

    Raises:
        SceneError: there is no scene with these attributes.
    """

    count: int
    shape: str
    color: str
    background: str
    size: str = "medium"
    position: str | None = None

    def __post_init__(self) -> None:
        # Lists, since what is no scene may not be hashable.
        valid: dict[str, list[Any]] = {
            "count": list(range(1, len(COUNTS) + 1)),
            "shape": list(SHAPES),
            "color": list(COLORS),
            "background": [color for color in COLORS if color != self.color],
            "size": list(EXTENTS),
            "position": [None, *POSITIONS] if self.count == 1 else [None],
        }
        for name, values in valid.items():
            value = getattr(self, name)
            if value not in values or type(value) not in map(type, values):  # 2.0 and True are numbers, too
                raise SceneError(f"{name}={value!r}: valid for this scene: {', '.join(map(str, values))}")

    @property
    def caption(self) -> str:
        """For example ``two large blue squares on a yellow background``."""
        adjectives = [self.color] if self.size == "medium" else [self.size, self.color]
        if self.count == 1:
            article = "an" if adjectives[0][0] in "aeiou" else "a"
            noun = [article, *adjectives, self.shape]
        else:
            plural = "crosses" if self.shape == "cross" else self.shape + "s"
            noun = [COUNTS[self.count - 1], *adjectives, plural]
        where = "on" if self.position is None else POSITIONS[self.position][0]
        article = "an" if self.background[0] in "aeiou" else "a"
        return " ".join([*noun, where, article, self.background, "background"])

    @property
    def held_out(self) -> bool:
        """Whether the embedded pipeline was trained without this caption: one in ten, chosen by its text alone."""
        return hashlib.sha256(self.caption.encode()).digest()[0] % 10 == 0

    def draw(self, rng: random.Random | None = None, loose: bool = False) -> Image:
        """An RGB picture of SIZE x SIZE.

        Args:
            rng: chooses among the places that the caption leaves open. None: always the same ones.
            loose: extents and places vary, too, within what the caption says.

        Raises:
            SceneError: ``loose`` without ``rng``.
        """
        if loose and rng is None:
            raise SceneError("loose=True: nothing can vary without rng")
        from PIL import Image, ImageDraw

        side = SIZE * _OVERSAMPLING
        picture = Image.new("RGB", (side, side), COLORS[self.background])
        pen = ImageDraw.Draw(picture)
        low, high = EXTENTS[self.size]
        extent = rng.uniform(low, high) if rng and loose else (low + high) / 2
        for x, y in self._loose_places(rng, extent) if rng and loose else self._places(rng):
            corners = [
                ((x + extent * u) * _OVERSAMPLING, (y + extent * v) * _OVERSAMPLING) for u, v in _OUTLINES[self.shape]
            ]
            pen.polygon(corners, fill=COLORS[self.color])
        return picture.resize((SIZE, SIZE), Image.Resampling.BOX)

    def _places(self, rng: random.Random | None) -> list[tuple[float, float]]:
        middle = SIZE / 2
        if self.count > 1:
            quarters = [(-1, -1), (1, 1), (-1, 1), (1, -1)]
            taken = rng.sample(sorted(quarters, key=lambda q: q[::-1]), self.count) if rng else quarters[: self.count]
            return [(middle + u * SIZE / 4, middle + v * SIZE / 4) for u, v in taken]
        position = self.position or (rng.choice(list(POSITIONS)) if rng else "center")
        _, right, down = POSITIONS[position]
        return [(middle + right * SIZE / 4, middle + down * SIZE / 4)]

    def _loose_places(self, rng: random.Random, extent: float) -> list[tuple[float, float]]:
        middle = SIZE / 2
        if self.count == 1:
            if self.position is None:
                room = middle - extent / 2 - 2
                return [(middle + rng.uniform(-room, room), middle + rng.uniform(-room, room))]
            _, right, down = POSITIONS[self.position]
            away = rng.uniform(14, 16)
            return [
                (
                    middle + right * away + rng.uniform(-3, 3) * (not right),
                    middle + down * away + rng.uniform(-3, 3) * (not down),
                )
            ]
        # Each in a quarter of its own, so that no two touch.
        room = SIZE / 4 - extent / 2 - 1
        quarters = rng.sample([(u, v) for v in (1, 3) for u in (1, 3)], self.count)
        return [(u * SIZE / 4 + rng.uniform(-room, room), v * SIZE / 4 + rng.uniform(-room, room)) for u, v in quarters]


# Corners of every shape of extent 1 around (0, 0).
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(math.cos(2 * math.pi * i / 48) / 2, math.sin(2 * math.pi * i / 48) / 2) for i in range(48)],
    "square": [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)],
    "triangle": [(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)],
    "cross": [
        (-_ARM / 2, -0.5), (_ARM / 2, -0.5), (_ARM / 2, -_ARM / 2), (0.5, -_ARM / 2),
        (0.5, _ARM / 2), (_ARM / 2, _ARM / 2), (_ARM / 2, 0.5), (-_ARM / 2, 0.5),
        (-_ARM / 2, _ARM / 2), (-0.5, _ARM / 2), (-0.5, -_ARM / 2), (-_ARM / 2, -_ARM / 2),
    ],
}  # fmt: skip


def scenes() -> Iterator[Scene]:
    """Every scene there is, in a fixed order."""
    for color, background in itertools.permutations(COLORS, 2):
        for shape, size in itertools.product(SHAPES, EXTENTS):
            for position in (None, *POSITIONS):
                yield Scene(1, shape, color, background, size, position)
            for count in range(2, len(COUNTS) + 1):
                yield Scene(count, shape, color, background, size)


def parse(caption: str) -> Scene:
    """The scene that ``caption`` describes.

    Raises:
        SceneError: the caption is none that `Scene.caption` could have made.
    """
    found = _by_caption().get(" ".join(caption.lower().split()).rstrip("."))
    if found is None:
        raise SceneError(
            f"caption {caption!r} describes no scene; it must read like 'two large blue squares on a yellow background'"
        )
    return found


_captions: dict[str, Scene] = {}


def _by_caption() -> dict[str, Scene]:
    if not _captions:
        _captions.update((scene.caption, scene) for scene in scenes())
    return _captions


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


_LEAST_AREA = 16  # in pixels; the smallest shape has about 100
_CONTRAST = 45.0  # distance in RGB between background and shape; the nearest two of COLORS are 103 apart
_TEMPLATE = 16


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


_masks: dict[str, list[Any]] = {}


def _templates() -> dict[str, list[Any]]:
    """Each shape sharp and, since a small one may be all rounded corners, blurred."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    if not _masks:
        side = 8 * _TEMPLATE
        for name, outline in _OUTLINES.items():
            picture = Image.new("L", (2 * side, 2 * side))
            ImageDraw.Draw(picture).polygon([((u + 1) * side, (v + 1) * side) for u, v in outline], fill=255)
            for blur in (0, 0.06, 0.12):
                cover = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur * side)), dtype=np.float32) / 255
                box = (*_span(cover.max(axis=0)), *_span(cover.max(axis=1)))
                _masks.setdefault(name, []).append(_stretched(cover, *box))
    return _masks
