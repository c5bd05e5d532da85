"""The page of a calibration: it needs no other file, shows every layer, and says which have no scale."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from fp8_compile import Calibration, calibrate
from fp8_compile.measure import calibration_page
from tests.support.blocks import WIDTH, Model, model, tokens
from tests.support.pages import Page


class Denoiser(Model):
    def forward(self, x: torch.Tensor, timestep: float = 0.0) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    high, low = Denoiser().bfloat16(), model(1)
    x = tokens()
    with torch.no_grad(), calibrate(high=high, low=low, progress=False) as found:
        for size in (1.0, 4.0):
            for timestep in (3.0, 2.0, 1.0):
                high(x * size, timestep=timestep)
        low(x)
        high.blocks[1].to_k(torch.full((1, WIDTH), 1e5, dtype=torch.bfloat16))
        high.blocks[2].to_q(x * torch.nan)
    return found


def test_it_shows_all_layers_and_needs_no_other_file(calibration: Calibration, tmp_path: Path) -> None:
    calibration_page.write(calibration, tmp_path / "calibration.html")
    text = (tmp_path / "calibration.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert page.tags.count("tr") == 2 + 12 + 4
    assert page.tags.count("figure") == 12 + 4
    assert "calls with x 1x32x64" in " ".join(page.texts)
    assert any(
        t.startswith("blocks.2.to_q: 2,048 of the 14,336 values of its input were NaN or Inf") for t in page.texts
    )
    first, second = (page.texts.index(path) for path in ("blocks.1.to_k", "blocks.0.to_q"))
    assert first < second  # almost all of its values are subnormal under the scale of the one huge call


def test_a_line_for_each_generation_and_a_mark_for_each_call(calibration: Calibration) -> None:
    text = calibration_page.html(calibration, worst=1)
    row = next(part for part in text.split("<tr>") if ">blocks.0.img_mlp.0<" in part)
    svg = ElementTree.fromstring(row[row.index("<svg") : row.index("</svg>") + 6])
    lines = [line.attrib["points"].split() for line in svg.iter("polyline")]
    assert [len(line) for line in lines] == [3, 3]
    places = [tuple(map(float, point.split(","))) for line in lines for point in line]
    assert all(0 <= x <= 160 and 0 <= y <= 32 for x, y in places)
    assert places == sorted(places, key=lambda place: place[0])
    assert Page(text).tags.count("figure") == 2
    assert "generation 1, call 2 (timestep 1)" in text


def test_rules_are_drawn_where_clipping_is(calibration: Calibration) -> None:
    text = calibration_page.html(calibration, worst=100)
    assert text.count(">amax: ") == 12 + 4
    assert "percentile: " in text
    assert ", mse: " in text


def test_a_layer_that_was_always_zero_has_no_plot() -> None:
    m = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH))
    with torch.no_grad(), calibrate(m, progress=False) as found:
        m(torch.zeros(1, WIDTH))
    text = calibration_page.html(found)
    assert text.count("no call had a range above zero") == 2
    assert "its input was always zero" in text
