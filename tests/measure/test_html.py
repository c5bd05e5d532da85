"""What pages are made of: differences of pictures, and axes."""

from __future__ import annotations

import io
import math

import pytest
from PIL import Image, ImageColor

from fp8_compile.measure.html import HEAT, Axis, data_uri, encode, heatmap


def test_a_heatmap_has_one_scale_for_all_pictures() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    for level, colour in HEAT.items():
        if level <= 127:
            for other in ((100 + level, 100, 99), (100, 99, 100 + level)) if level else ((100, 100, 100),):
                assert heatmap(grey, Image.new("RGB", (4, 4), other)).getpixel((1, 1)) == ImageColor.getrgb(colour)
    black, white = (Image.new("RGB", (4, 4), name) for name in ("black", "white"))
    assert heatmap(black, white).getpixel((0, 0)) == ImageColor.getrgb(HEAT[255])
    shades = [sum(heatmap(black, Image.new("L", (1, 1), level)).getpixel((0, 0))) for level in range(256)]  # type: ignore[arg-type]
    assert shades == sorted(shades)
    assert len(set(shades)) > 200


def test_small_pictures_are_kept_as_they_are_and_larger_ones_nearly() -> None:
    noise = Image.effect_noise((300, 40), 80).convert("RGB")
    for picture, exact in ((noise.crop((0, 0, 256, 40)), True), (noise, False)):
        encoded = encode(picture)
        assert data_uri(encoded).startswith("data:image/webp;base64,")
        again = Image.open(io.BytesIO(encoded)).convert("RGB")
        assert again.size == picture.size
        assert (again.tobytes() == picture.tobytes()) == exact


@pytest.mark.parametrize("values", [(0.3, 0.5), (1.0,), (0.0, 0.0), (-40.0, 1e-3), (1e-4, 2e-4), (31.2, 1e5)])
def test_an_axis_holds_its_values_and_has_round_ticks(values: tuple[float, ...]) -> None:
    axis = Axis.over("x", values, 64, 624)
    assert all(64 <= axis.place(value) <= 624 for value in values)
    assert 3 <= len(axis.ticks) <= 8
    steps = [float(b) - float(a) for (a, _), (b, _) in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert all(step == pytest.approx(steps[0]) for step in steps)
    assert all(axis.place(float(text)) == pytest.approx(x, abs=0.2) for text, x in axis.ticks)
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)) in (1, 2, 5, 10)
