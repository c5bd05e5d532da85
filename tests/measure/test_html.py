"""What pages are made of: differences of pictures, and axes."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from fp8_compile.measure.html import Axis, amplification, difference


def test_a_difference_map_is_amplified_as_stated() -> None:
    grey, lighter = (Image.new("RGB", (4, 4), (level,) * 3) for level in (100, 103))
    assert difference(grey, lighter).getpixel((0, 0)) == (3, 3, 3)
    assert difference(lighter, grey, 64).getpixel((0, 0)) == (192, 192, 192)
    assert difference(grey, lighter, 128).getpixel((0, 0)) == (255, 255, 255)
    assert [amplification(largest) for largest in (0, 1, 3, 127, 128, 255)] == [1, 128, 64, 2, 1, 1]


@pytest.mark.parametrize("values", [(0.3, 0.5), (1.0,), (0.0, 0.0), (-40.0, 1e-3), (1e-4, 2e-4), (31.2, 1e5)])
def test_an_axis_holds_its_values_and_has_round_ticks(values: tuple[float, ...]) -> None:
    axis = Axis.over("x", values, 64, 624)
    assert all(64 <= axis.place(value) <= 624 for value in values)
    assert 3 <= len(axis.ticks) <= 8
    steps = [float(b) - float(a) for (a, _), (b, _) in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert all(step == pytest.approx(steps[0]) for step in steps)
    assert all(axis.place(float(text)) == pytest.approx(x, abs=0.2) for text, x in axis.ticks)
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)) in (1, 2, 5, 10)
