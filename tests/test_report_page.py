"""The report as a page: opened from the disk, in a real browser where there is one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp8_compile

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))
        self.add_module("</script><b>", nn.Linear(256, 64))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    model = Odd().to(torch.bfloat16)
    fp8_compile.quantize_(model, {"ignored_layers": ["blocks.1"]})
    found = fp8_compile.report(model)
    found.html(tmp_path / "report.html")
    assert [row["decision"] for row in found.rows()] == ["quantized", "unquantized", "quantized", "unquantized"]
    return tmp_path / "report.html"


def test_it_is_one_file_and_no_name_ends_its_script(page: Path) -> None:
    text = page.read_text()
    assert text.count("</script>") == 2
    assert "http" not in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [1400, 400])
def test_layers_can_be_looked_into(page: Path, width: int) -> None:
    playwright: Any = pytest.importorskip("playwright.sync_api", reason="pip install 'fp8-compile[browser]'")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": width, "height": 900})
        problems: list[str] = []
        shown.on("pageerror", lambda error: problems.append(str(error)))
        shown.goto(page.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        shown.get_by_title("blocks.1", exact=True).hover()
        assert "unquantized: ignored_layers: blocks.1" in shown.locator("#about").inner_text()
        shown.get_by_title("blocks", exact=True).click()
        assert shown.locator("#icicle button").count() == 4
        shown.get_by_text("after", exact=True).click()
        assert shown.locator("tbody tr").first.inner_text().startswith("blocks.1")
        assert problems == []
        browser.close()
