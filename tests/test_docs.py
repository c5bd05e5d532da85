"""Code in README and docs: all of it is valid, commands and options exist, and the pages for beginners run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

from fp8_compile.cli.main import app
from tests.support.run_page import NOTE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: Any = typer.main.get_command(app)


def blocks(page: Path, language: str, noted: bool = True) -> list[str]:
    """The code blocks of ``page`` in this language, in their order; or those alone that no note says the fate of."""
    document = Document.parse(str(page), CodeBlockParser(language, lambda example: None))
    found = [(str(example.parsed), NOTE.search(document.text, 0, example.start)) for example in document.examples()]
    return [text for text, note in found if noted or note is None]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of ours in a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"(?:^|[\s/])fp8-diffusion (\S[^|;&>#]*)", line):
            yield shlex.split(found[1])


def test_consoles_are_for_reading() -> None:
    assert not [text for page in PAGES for text in blocks(page, "console", noted=False)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_valid_and_options_exist(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")
    for text in blocks(page, "toml"):
        tomllib.loads(text)
    for text in blocks(page, "json"):
        rest = text.strip()
        while rest:  # several objects, one after another
            rest = rest[json.JSONDecoder().raw_decode(rest)[1] :].strip()
    for text in (*blocks(page, "bash"), *blocks(page, "console")):
        for name, *words in commands(text):
            assert name in COMMANDS.commands or name.startswith("-"), name
            if name in COMMANDS.commands:
                known = {option for parameter in COMMANDS.commands[name].params for option in parameter.opts}
                given = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
                assert given <= known | {"--help"}, f"{page.name}: {name} {given - known}"


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash", noted=False)], ids=lambda page: page.name)
def test_scripts_run(page: Path, tmp_path: Path) -> None:
    """Every one, but those that a comment says the reason of."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, module in (("fp8-diffusion", "fp8_compile"), ("diffusers-cli", "diffusers.commands.diffusers_cli")):
        text = f"import sys, runpy; sys.argv[0] = {name!r}; runpy.run_module({module!r}, run_name='__main__')"
        (bin / name).write_text(f"#!{sys.executable}\n{text}\n")
        (bin / name).chmod(0o755)
    path = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for text in blocks(page, "bash", noted=False):
        run(["bash", "-ec", text], tmp_path, PATH=path)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """Every block of it, but those that a comment says the reason of."""
    run([sys.executable, "-m", "tests.support.run_page", str(page)], tmp_path, PYTHONPATH=str(ROOT))


def run(command: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"
