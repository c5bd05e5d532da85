"""HTML pages that need no other file: pictures are data URIs, plots inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# Lossless up to this many pixels on the longer side; larger pictures would make pages of hundreds of MB.
LOSSLESS_SIDE = 256

HEAT = {
    0: "#000004",
    1: "#1f0c48",
    3: "#550f6d",
    7: "#88226a",
    15: "#ba3655",
    31: "#e35933",
    63: "#f98e09",
    127: "#f9cb35",
    255: "#fcffa4",
}
"""Colours of `heatmap` by the difference, 0 to 255: matplotlib's inferno, whose lightness grows with the difference."""


def render(template: str, **values: Any) -> str:
    """The page that ``templates/<template>`` makes of ``values``; everything in them is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fp8_compile.measure"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def encode(image: Image) -> bytes:
    """``image`` as WebP, lossless, or of quality 90 where it is longer than `LOSSLESS_SIDE`."""
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=max(image.size) <= LOSSLESS_SIDE, quality=90)
    return buffer.getvalue()


def data_uri(webp: bytes) -> str:
    """What `encode` gave, as the source of a picture."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def heatmap(reference: Image, image: Image) -> Image:
    """Where ``image`` differs from ``reference``: of each pixel, the channel that differs most, in colours of `HEAT`.

    The scale is logarithmic, and the same for all pictures, so that they compare with one another.
    """
    from PIL import ImageChops

    red, green, blue = ImageChops.difference(reference.convert("RGB"), image.convert("RGB")).split()
    levels = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    levels.putpalette(_palette())
    return levels.convert("RGB")


def _palette() -> list[int]:
    """Red, green and blue of every difference from 0 to 255: `HEAT`, linear in the logarithm between its colours."""
    colours = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in HEAT.values()]
    found = []
    for level in range(256):
        place = math.log2(1 + level)
        below = min(int(place), len(colours) - 2)
        found += [round(a + (b - a) * (place - below)) for a, b in zip(colours[below], colours[below + 1], strict=True)]
    return found


@dataclass(frozen=True)
class Point:
    """A mark in a `Plot`.

    Attributes:
        label: a few characters, written beside the mark where there is room.
        title: what a pointer over the mark tells.
        good: drawn full, else hollow.
        name: a longer label, for which there may be room as well.
        shows: the number of the pictures that a click on the mark shows.
    """

    x: float
    y: float
    label: str
    title: str
    good: bool = True
    name: str = ""
    shows: int | None = None


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        ticks: values and their places in the picture.
    """

    label: str
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[str, float], ...]

    def place(self, value: float) -> float:
        """Where ``value`` is in the picture."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @classmethod
    def over(cls, label: str, values: Sequence[float], start: float, end: float) -> Axis:
        """An axis from ``start`` to ``end`` in the picture that holds all ``values``, with round numbers as ticks."""
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
        low, high = low - margin, high + margin
        rough = (high - low) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        digits = max(0, -math.floor(math.log10(step)))
        counts = range(math.ceil(low / step), math.floor(high / step) + 1)
        axis = cls(label, low, high, start, end, ())
        # + 0 makes of a negative zero a zero.
        ticks = tuple((f"{round(count * step, digits) + 0:.{digits}f}", axis.place(count * step)) for count in counts)
        return cls(label, low, high, start, end, ticks)


@dataclass(frozen=True)
class Plot:
    """A scatter plot, 640 x 400; ``templates/plot.svg.j2`` draws it.

    Attributes:
        rules: horizontal lines across the plot: y and what is written at it.
        path: join the points in their order.
    """

    x: Axis
    y: Axis
    points: tuple[Point, ...]
    rules: tuple[tuple[float, str], ...] = ()
    path: bool = False

    @property
    def radius(self) -> float:
        """Of the marks; less where they are many."""
        return max(4.0, min(6.0, 300 / len(self.points)))

    @classmethod
    def of(
        cls,
        points: Sequence[Point],
        x_label: str,
        y_label: str,
        rules: Sequence[tuple[float, str]] = (),
        path: bool = False,
    ) -> Plot:
        """A plot with axes that hold all of ``points``, of which there must be one, and ``rules``."""
        return cls(
            Axis.over(x_label, [p.x for p in points], 84, 624),
            Axis.over(y_label, [*(p.y for p in points), *(y for y, _ in rules)], 344, 16),
            tuple(points),
            tuple(rules),
            path,
        )
