"""The rooms of the package: an arrow between them only points down, and there is no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fp8_compile"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter, with the contracts of pyproject.toml, on the package in ``folder``."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_arrows_point_down_and_there_is_no_circle() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("schemes/scheme.py", "def f():\n    from ..passes import plan", "an arrow only points down"),
        ("options.py", "if __debug__:\n    from . import schemes", "an arrow only points down"),
        ("passes/graphs.py", "def f():\n    from . import linears", "no circle, in any room"),
        ("new_room.py", "", "an arrow only points down"),  # a module without a place
    ],
)
def test_a_wrong_arrow_is_found(file: str, line: str, broken: str, tmp_path: Path) -> None:
    for source in [*PACKAGE.rglob("*.py"), ROOT / "pyproject.toml"]:
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    with (tmp_path / "fp8_compile" / file).open("a") as opened:
        opened.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert f"{broken} BROKEN" in done.stdout, done.stdout


def test_no_module_imports_the_package_itself() -> None:
    """That would be an arrow to everything."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "fp8_compile" not in {alias.name.partition(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom) and node.level == len(path.relative_to(PACKAGE).parts):
                assert (
                    node.module is not None
                    or path.parent == PACKAGE
                    or all(
                        (PACKAGE / f"{alias.name}.py").exists() or (PACKAGE / alias.name).is_dir()
                        for alias in node.names
                    )
                ), path


HEAVY = {"diffusers", "transformers", "typer", "fastapi", "ray", "rich", "PIL", "jinja2", "numpy", "torchao", "peft"}


def test_heavy_imports_stand_in_the_room_that_needs_them() -> None:
    for room in ("passes", "schemes", "weights", "runtime", "inductor"):
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not HEAVY & {name.partition(".")[0] for name in names}, path
