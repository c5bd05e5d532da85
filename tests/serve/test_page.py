"""The page of the server in a real browser. ``FP8_SCREENSHOTS`` names a folder for what it looks like."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fp8_compile.pipelines.session import Session
from tests.support.serving import MODEL, Served, WatchedSession, serving

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'fp8-compile[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.pipeline,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_is_drawn_with_previews_and_kept(served: Served, browser: Any, scheme: str, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme=scheme)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(served.url)
    expect = playwright.expect
    expect(page.locator("#model")).to_have_text("embedded:qwen-image")
    page.evaluate(
        "window.told = []; new MutationObserver(() => told.push(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), {childList: true})"
    )
    for seed in ("7", "18446744073709551615"):
        page.get_by_label("Seed").fill(seed)
        page.get_by_label("Size").fill("64x64")
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#status")).to_contain_text(f"64x64, seed {seed}", timeout=20_000)
    told = page.evaluate("told")
    assert [text.split(",")[0] for text in told[:5]] == ["drawing", "preview 1", "preview 2", "preview 3", "64x64"]
    assert page.evaluate("document.querySelector('#shown img').naturalWidth") == 64
    expect(page.get_by_label("beside")).to_be_hidden()
    expect(page.locator("#history button")).to_have_count(2)
    page.locator("#history button").last.click()
    expect(page.get_by_label("Seed")).to_have_value("7")
    folder = Path(os.environ.get("FP8_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"page-{scheme}.png", full_page=True)
    assert not problems
    page.get_by_label("Size").fill("65x64")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#status")).to_have_text("size='65x64': expected multiples of 16")
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fp8_is_drawn_beside_bf16(browser: Any, scheme: str, tmp_path: Path) -> None:
    session = Session.load(MODEL, at_load={"strict": True})
    session = dataclasses.replace(session, twin=session.unquantized_twin())
    watched = WatchedSession(**{f.name: getattr(session, f.name) for f in dataclasses.fields(session)})
    with serving(watched, tmp_path) as both:
        page = browser.new_page(color_scheme=scheme)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(both.url)
        expect = playwright.expect
        page.get_by_label("FP8 beside BF16").check()
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#status")).to_contain_text("64x64, seed", timeout=20_000)
        expect(page.locator("#shown figcaption")).to_have_text(
            [re.compile(r"^FP8 \d+\.\d\d s$"), re.compile(r"^BF16 \d")]
        )
        left, right = (page.locator("#shown img").nth(i) for i in (0, 1))
        assert left.bounding_box()["y"] == right.bounding_box()["y"]  # side by side
        assert left.get_attribute("src") != right.get_attribute("src")
        seed = re.search(r"seed (\d+)", page.locator("#status").text_content())[1]
        (fp8,), (bf16,) = both.draw(seed=int(seed)), both.draw(seed=int(seed), unquantized=True)
        assert left.get_attribute("src").endswith(fp8.b64_json)
        assert right.get_attribute("src").endswith(bf16.b64_json)
        expect(page.locator("#history button img")).to_have_count(2)
        folder = Path(os.environ.get("FP8_SCREENSHOTS", tmp_path))
        page.screenshot(path=folder / f"compare-{scheme}.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 800})
        page.screenshot(path=folder / f"compare-narrow-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.get_by_label("FP8 beside BF16").uncheck()
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#shown figcaption")).to_have_count(1)
        assert not problems
        page.close()


def test_a_pipeline_without_previews_is_drawn_all_the_same(
    served: Served, session: WatchedSession, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = dataclasses.replace(served.engine.abilities, no_previews="there are none")
    monkeypatch.setattr(served.engine, "_abilities", without)
    with serving(session, tmp_path, engine=served.engine) as hidden:
        page = browser.new_page()
        page.goto(hidden.url)
        page.get_by_role("button", name="Draw").click()
        playwright.expect(page.locator("#status")).to_contain_text("64x64, seed", timeout=20_000)
        page.close()


def test_a_key_is_asked_for(served: Served, session: WatchedSession, browser: Any, tmp_path: Path) -> None:
    with serving(session, tmp_path, engine=served.engine, key="sesame") as locked:
        page = browser.new_page()
        page.goto(locked.url)
        expect = playwright.expect
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#status")).to_contain_text("expected an API key")
        page.get_by_label("API key").fill("sesame")
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#status")).to_contain_text("64x64, seed", timeout=20_000)
        page.close()
