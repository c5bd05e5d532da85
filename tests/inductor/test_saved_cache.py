"""Compiled code in files: found where the same is compiled, and refused in words where it would not be."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from fp8_compile.inductor.saved_cache import MADE_WITH, SavedCacheError, load
from tests.support.processes import run_python

COMPILING = """
    import torch
    from pathlib import Path
    from torch._dynamo.utils import counters
    from fp8_compile.inductor import saved_cache
    from tests.support.blocks import model, tokens
    def compiled():
        with torch.no_grad():
            torch.compile(model(1), backend="fp8_diffusion", options={{"min_features": 64}})(tokens())
    {todo}
    print(sorted(counters["aot_autograd"].items()))
"""


@pytest.mark.slow
@pytest.mark.inductor
def test_a_process_with_empty_caches_compiles_from_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "saved"

    def run(todo: str, caches: str) -> str:
        return run_python(COMPILING.format(todo=todo), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / caches)).stdout

    first = run(f"compiled(); assert saved_cache.save(Path({str(folder)!r}), 'cpu') > 1000", "first")
    assert "('autograd_cache_miss', 1)" in first
    second = run(f"assert saved_cache.load(Path({str(folder)!r}), 'cpu') is None; compiled()", "second")
    assert "('autograd_cache_hit', 1)" in second
    assert "autograd_cache_miss" not in second


def write(folder: Path, **changed: str) -> None:
    """As if this process had saved it, but for what is ``changed``."""
    from fp8_compile.inductor import saved_cache

    (folder / MADE_WITH).write_text(json.dumps({**saved_cache._made_with("cpu"), **changed}))
    (folder / "artifacts.bin").write_bytes(b"no artifacts")


@pytest.mark.parametrize("what", ["torch", "source", "device", "python"])
def test_what_was_made_elsewhere_is_not_loaded(tmp_path: Path, what: str) -> None:
    write(tmp_path, **{what: "other"})
    here = {"torch": torch.__version__, "device": platform.machine(), "python": platform.python_version()}
    told = load(tmp_path, "cpu")
    assert told is not None
    assert told.startswith(f"it was made with another {what}: 'other', here '{here.get(what, '')}")


def test_what_is_no_saved_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SavedCacheError, match="has no compiled code"):
        load(tmp_path / "nowhere", "cpu")
    write(tmp_path)
    with pytest.raises(SavedCacheError, match="cannot be read"):
        load(tmp_path, "cpu")
