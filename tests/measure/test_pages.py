"""The pages of ablations and searches in a browser: what can be reached, compared and read, on screens of any width."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8_compile.measure import ablation_page, search_page
from fp8_compile.measure.ablate import ablate
from fp8_compile.measure.search import Bound, Search
from fp8_compile.measure.variants import Variants
from tests.support.pipelines import OPTIONS, Pipeline, with_outlier

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
PROMPTS, SEEDS = ("a red circle", "two blue squares"), (0, 1)

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to show the page in"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a page of each kind, and an ablation of many rows that are nearly alike."""
    folder = tmp_path_factory.mktemp("pages")
    torch.compiler.reset()
    groups = {"all FP8": (), "keep the two linears of the MLP": ("mlp",), "keep to_q": ("to_q",)}
    found = ablate(Variants(Pipeline(), OPTIONS), groups, PROMPTS, SEEDS, rounds=1)
    (folder / "ablation.html").write_text(ablation_page.html(found, len(PROMPTS) * len(SEEDS)))
    rows = [
        dataclasses.replace(row, name=f"{row.name}, once more, {i}", step_seconds=[1.0 + i / 100])
        for i, row in enumerate(itertools.islice(itertools.cycle(found.rows[1:]), 40))
    ]
    crowd = dataclasses.replace(found, rows=(dataclasses.replace(found.rows[0], step_seconds=[1.0]), *rows))
    (folder / "crowd.html").write_text(ablation_page.html(crowd, 1))
    variants = Variants(with_outlier(Pipeline(), block=1), {**OPTIONS, "granularity": "tensor"})
    search = Search(variants, Bound("relative_l2", 0.08), PROMPTS, SEEDS, folder / "search.json")
    (folder / "search.html").write_text(search_page.html(search, search.run("blocks-then-layers")))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright: Any = pytest.importorskip("playwright.sync_api", reason="pip install 'fp8-compile[browser]'")
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture
def show(browser: Any, pages: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page; errors of its scripts, and whatever else it asks for, fail."""
    problems: list[str] = []

    def opened(kind: str, width: int, dark: bool = False) -> Any:
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
        tab.on("pageerror", lambda error: problems.append(str(error)))
        address = (pages / f"{kind}.html").as_uri()
        tab.on("request", lambda asked: asked.url.startswith(("data:", address)) or problems.append(asked.url))
        tab.goto(address)
        return tab

    yield opened
    assert problems == []


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("kind", ["ablation", "search"])
def test_every_picture_is_reached_and_compared(kind: str, width: int, show: Callable[..., Any]) -> None:
    page = show(kind, width)
    titles = set()
    for _ in range(len(PROMPTS) * len(SEEDS)):
        assert page.locator(".sample:visible").count() == 1
        titles.add(page.locator(".sample:visible h3").inner_text())
        page.keyboard.press("ArrowRight")
    assert titles == {f"{prompt} seed {seed}" for prompt in PROMPTS for seed in SEEDS}
    page.locator("#sample").select_option(index=2)
    assert page.locator(".sample:visible h3").inner_text() == "two blue squares seed 0"
    page.locator("#cut").fill("20")
    assert "80%" in page.locator("#above").evaluate("image => image.style.clipPath")
    page.locator("#blink").check()
    page.wait_for_function("document.getElementById('above').style.clipPath.includes('100%')")

    page.locator("#right").select_option(index=0)  # BF16, which does not differ from itself
    assert not page.locator("#heat").is_visible()
    last = page.locator("svg.plot a").last
    number = last.get_attribute("data-shows")
    last.locator("circle").click(force=True)
    expected = page.locator(f".sample:visible figure[data-number='{number}']")
    for target, source in (("#below", "img:not(.heat)"), ("#heat", ".heat")):
        assert page.locator(target).get_attribute("src") == expected.locator(source).get_attribute("src")
    assert page.locator("#compare").evaluate("box => box.getBoundingClientRect().top < innerHeight")
    row = page.locator("tbody a").nth(1)
    row.click()
    assert page.locator("#right").input_value() == row.inner_text()


@pytest.mark.parametrize("width", [1400, 700, 400])
@pytest.mark.parametrize("kind", ["ablation", "search"])
def test_no_column_is_cut_and_each_sorts_the_table(kind: str, width: int, show: Callable[..., Any]) -> None:
    page = show(kind, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "[...document.querySelectorAll('th, td')].every(cell => cell.getBoundingClientRect().right <= innerWidth)"
    )
    heads = page.locator("thead th").all_inner_texts()
    name = "FP8 layers" if kind == "ablation" else "layers kept"
    column = page.locator(f"tbody tr td:nth-child({1 + heads.index(name)})")
    for order, again in (("ascending", False), ("descending", True)):
        page.locator("thead th", has_text=name).click()
        numbers = [int(text) for text in column.all_inner_texts()]
        assert numbers == sorted(numbers, reverse=again)
        assert page.locator(f"th[aria-sort={order}]").inner_text() == name
    page.locator("thead th").first.press("Enter")
    rows = [int(text) for text in page.locator("tbody tr td:first-child").all_inner_texts()]
    assert rows == sorted(rows)


OVERLAPS = """() => {
  const box = (one) => [one.textContent.trim() || "a mark", one.getBoundingClientRect()];
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
  const plot = document.querySelector("svg.plot"), marks = [...plot.querySelectorAll("circle")].map(box);
  const texts = [...plot.querySelectorAll("text")].filter((one) => one.textContent).map(box);
  const edge = plot.getBoundingClientRect(), found = [];
  texts.forEach(([text, a], i) => {
    for (const [other, b] of [...texts.slice(i + 1), ...marks]) if (!apart(a, b)) found.push([text, other]);
    if (a.left < edge.left || a.right > edge.right || a.top < edge.top || a.bottom > edge.bottom)
      found.push([text, "the edge"]);
  });
  return found;
}"""


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("kind", ["ablation", "search", "crowd"])
def test_labels_of_a_plot_overlap_nothing(kind: str, width: int, show: Callable[..., Any]) -> None:
    page = show(kind, width)
    assert page.evaluate(OVERLAPS) == []
    labels = [text for text in page.locator("svg.plot text.label").all_text_contents() if text]
    if kind == "ablation":
        assert labels == ["2 all FP8", "3 keep the two linears of the MLP", "4 keep to_q"]
    assert len(labels) > 2
    page.set_viewport_size({"width": 1800 - width, "height": 900})  # other sizes of letters
    assert page.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("kind", ["ablation", "search"])
def test_text_is_read_on_light_and_dark_ground(kind: str, show: Callable[..., Any]) -> None:
    brightness = """([selector, name]) => getComputedStyle(document.querySelector(selector))[name]
        .match(/\\d+/g).slice(0, 3).reduce((sum, value) => sum + Number(value), 0)"""
    for dark in (False, True):
        page = show(kind, 1400, dark)
        of = (["body", "backgroundColor"], ["svg.plot text.label", "fill"])
        ground, label = (page.evaluate(brightness, one) for one in of)
        assert (ground < 150 and label > 500) if dark else (ground > 600 and label < 200)
