"""Simple scenes with captions, and pictures of them.

The embedded pipelines are trained on such scenes. Whether a picture shows what its prompt says is decided by
`scene_detector.detect`, which knows these scenes and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Fp8Error

if TYPE_CHECKING:
    import random

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
                ((x + extent * u) * _OVERSAMPLING, (y + extent * v) * _OVERSAMPLING) for u, v in OUTLINES[self.shape]
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


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(math.cos(2 * math.pi * i / 48) / 2, math.sin(2 * math.pi * i / 48) / 2) for i in range(48)],
    "square": [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)],
    "triangle": [(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)],
    "cross": [
        (-_ARM / 2, -0.5), (_ARM / 2, -0.5), (_ARM / 2, -_ARM / 2), (0.5, -_ARM / 2),
        (0.5, _ARM / 2), (_ARM / 2, _ARM / 2), (_ARM / 2, 0.5), (-_ARM / 2, 0.5),
        (-_ARM / 2, _ARM / 2), (-0.5, _ARM / 2), (-0.5, -_ARM / 2), (-_ARM / 2, -_ARM / 2),
    ],
}  # fmt: skip
"""Corners of every shape of extent 1 around (0, 0)."""


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


@functools.cache
def _by_caption() -> dict[str, Scene]:
    return {scene.caption: scene for scene in scenes()}
