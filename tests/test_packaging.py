"""What is built from a checkout without symbolic links holds the whole of its package, once, and works."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PASSES = sorted(path.name for path in (ROOT / "fp8_compile" / "passes").glob("*.py"))

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="builds from a git checkout, and this is none"),
]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, target: Path, kind: str) -> Path:
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", target, source, cwd=source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which links are text files, as Git makes them on Windows; of the work tree's tracked files."""
    target = tmp_path_factory.mktemp("clone") / "fp8_compile"
    run("git", "clone", "--quiet", "-c", "core.symlinks=false", ROOT, target, cwd=ROOT)
    assert not (target / "passes").is_symlink()
    assert (target / "passes").read_text() == "fp8_compile/passes"
    return target


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the clone, and unpacked."""
    built = build(clone, tmp_path_factory.mktemp("sdist"), "sdist")
    target = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built) as opened:
        names = opened.getnames()
        opened.extractall(target, filter="data")
    assert Counter(names).most_common(1)[0][1] == 1
    (folder,) = target.iterdir()
    return folder


def imports_all_passes(folder: Path, elsewhere: Path) -> None:
    """Whether the package in ``folder``, and no other, imports all passes."""
    code = f"""
import importlib, pathlib, fp8_compile
assert pathlib.Path(fp8_compile.__file__).is_relative_to({str(folder)!r}), fp8_compile.__file__
for name in {PASSES!r}:
    importlib.import_module("fp8_compile.passes." + name.removesuffix(".py"))
"""
    run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(folder))


@pytest.mark.parametrize("source", ["clone", "sdist"])
def test_a_wheel(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    wheel = build(request.getfixturevalue(source), tmp_path / "wheel", "wheel")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        opened.extractall(tmp_path / "unpacked")
    assert Counter(names).most_common(1)[0][1] == 1
    assert sorted(n for n in names if "passes/" in n) == [f"fp8_compile/passes/{name}" for name in PASSES]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fp8_compile"}
    assert "fp8_compile/py.typed" in names
    assert "fp8_compile/measure/templates/page.html.j2" in names
    assert wheel.stat().st_size < 5_000_000
    imports_all_passes(tmp_path / "unpacked", tmp_path)


def test_the_wheel_of_the_embedded_pipelines(clone: Path, tmp_path: Path) -> None:
    """It has the tracked files and no others, and the backend's finds them where there is no checkout."""
    source, installed = clone / "embedded", tmp_path / "installed"
    tracked = run("git", "ls-files", "fp8_compile_embedded", cwd=source).split()
    with zipfile.ZipFile(build(source, tmp_path / "wheel", "wheel")) as opened:
        assert sorted(name for name in opened.namelist() if ".dist-info/" not in name) == sorted(tracked)
        opened.extractall(installed)
    for name in tracked:
        assert (installed / name).read_bytes() == (source / name).read_bytes(), name
    with zipfile.ZipFile(build(clone, tmp_path / "backend", "wheel")) as opened:
        opened.extractall(installed)
    code = """
import fp8_compile, fp8_compile_embedded
assert fp8_compile_embedded.__version__ == fp8_compile.__version__
for name in fp8_compile.embedded.EMBEDDED_CALLS:
    print(fp8_compile.embedded.default_pipeline_dir(name))
"""
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert found == [f"{installed}/fp8_compile_embedded/{name}" for name in ("qwen-image", "z-image")]


def test_the_sdist_holds_everything_once_and_its_tests_run(sdist: Path) -> None:
    assert sorted(path.name for path in (sdist / "fp8_compile" / "passes").glob("*.py")) == PASSES
    assert not (sdist / "passes").exists()
    collected = run(sys.executable, "-m", "pytest", "-n0", "-q", "--collect-only", cwd=sdist, PYTHONPATH=str(sdist))
    assert "test_packaging" in collected
    run(sys.executable, "-m", "pytest", "-n0", "-q", "tests/passes/test_plan.py", cwd=sdist, PYTHONPATH=str(sdist))


def test_a_zip_of_the_tree(tmp_path: Path) -> None:
    run("git", "archive", "--format=zip", "--output", tmp_path / "tree.zip", "HEAD", cwd=ROOT)
    with zipfile.ZipFile(tmp_path / "tree.zip") as opened:
        opened.extractall(tmp_path / "tree")
    imports_all_passes(tmp_path / "tree", tmp_path)


def test_git_knows_the_file_that_a_traceback_names() -> None:
    from fp8_compile.passes import plan

    path = Path(plan.__file__).relative_to(ROOT)
    assert run("git", "ls-files", path, cwd=ROOT).strip() == str(path)
    assert run("git", "blame", "-L1,1", path, cwd=ROOT)


def test_versions_agree() -> None:
    import fp8_compile

    for command in (
        ["-m", "fp8_compile", "--version"],
        ["-c", "from fp8_compile.cli.main import main; main()", "--version"],
    ):
        assert run(sys.executable, *command, cwd=ROOT).split()[-1] == fp8_compile.__version__


def test_names_can_be_looked_up_without_what_they_need() -> None:
    script = """
import sys
for name in ("diffusers", "transformers", "typer"):
    sys.modules[name] = None
import fp8_compile
from fp8_compile import *
assert hasattr(fp8_compile, "Fp8DiffusionConfig") and "Fp8DiffusionConfig" in dir(fp8_compile)
assert set(fp8_compile.__all__) <= set(dir(fp8_compile))
assert fp8_compile.embedded.default_pipeline_dir().is_dir()
help(Fp8DiffusionConfig)
try:
    Fp8DiffusionConfig(ignored_layers=["img_mlp"])
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Fp8DiffusionConfig needs diffusers: pip install 'fp8-compile[cli]'\n")
