"""``fp8-diffusion compile``: saves what a server compiles, for its next start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8_compile.inductor.saved_cache import MADE_WITH

pytestmark = pytest.mark.pipeline


def command(*arguments: str, caches: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(caches)}
    return subprocess.run(
        [sys.executable, "-m", "fp8_compile", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_where_nothing_is_compiled_nothing_is_saved(tmp_path: Path) -> None:
    options = ["--no-quantization", "--inner-backend", "eager", "--max-batch", "1"]
    done = command("compile", *options, "--output", str(tmp_path / "saved"), caches=tmp_path)
    assert done.returncode == 1
    assert "Inductor has compiled nothing" in done.stderr
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.inductor
def test_what_is_saved_is_used_and_what_does_not_fit_is_said(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    done = command("compile", "--max-batch", "1", "--output", str(saved), caches=tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert f"serve --compile-cache {saved}" in done.stdout
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n')
    batch = ["batch", str(tmp_path / "prompts.jsonl"), "--max-batch", "1", "--compile-cache", str(saved)]
    done = command(*batch, "--output", str(tmp_path / "pictures"), caches=tmp_path / "second")
    assert done.returncode == 0, done.stderr
    assert f"--compile-cache {saved}: compiled code is taken from it" in done.stderr
    made_with = json.loads((saved / MADE_WITH).read_text())
    (saved / MADE_WITH).write_text(json.dumps(made_with | {"torch": "1.0"}))
    options = ["--no-quantization", "--inner-backend", "eager", "--output", str(tmp_path / "others")]
    done = command(*batch, *options, caches=tmp_path / "second")
    assert done.returncode == 0, done.stderr
    assert "made with another torch: '1.0'" in done.stderr
