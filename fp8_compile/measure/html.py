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


def data_uri(image: Image) -> str:
    """``image`` as PNG, or as WebP of quality 90 where it is longer than `LOSSLESS_SIDE`."""
    kind = "png" if max(image.size) <= LOSSLESS_SIDE else "webp"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def difference(reference: Image, image: Image, amplification: float = 1) -> Image:
    """``|image - reference| * amplification`` per pixel and channel, clipped at 255; RGB."""
    from PIL import ImageChops

    found = ImageChops.difference(reference.convert("RGB"), image.convert("RGB"))
    return found.point(lambda level: min(255, level * amplification))


def amplification(largest: int) -> int:
    """The power of two that makes a difference of ``largest`` (0 to 255) as bright as it can be without clipping."""
    return 1 if largest == 0 else 2 ** max(0, math.floor(math.log2(255 / largest)))


@dataclass(frozen=True)
class Point:
    """A mark in a `Plot`.

    Attributes:
        label: a few characters, written into the mark.
        title: what a pointer over the mark tells.
        good: drawn full, else hollow.
    """

    x: float
    y: float
    label: str
    title: str
    good: bool = True


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
        """Of the marks; below 8 they are too many to be written into."""
        return max(4.0, min(10.0, 300 / len(self.points)))

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
            Axis.over(x_label, [p.x for p in points], 64, 624),
            Axis.over(y_label, [*(p.y for p in points), *(y for y, _ in rules)], 344, 16),
            tuple(points),
            tuple(rules),
            path,
        )
