"""A file of requests: each picture once, also after a kill -9."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fp8_compile.serve.batch import BatchError, Line, Made, Manifest, lines_left
from tests.support.ray_cluster import ray_cluster
from tests.support.serving import PROMPT, WatchedSession, wait_for

COMMAND = [sys.executable, "-m", "fp8_compile", "batch"]
OPTIONS = ["--no-quantization", "--inner-backend", "eager", "--max-batch", "1"]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def manifest(folder: Path) -> list[dict[str, Any]]:
    """Its whole lines: the last one may be half written."""
    path = folder / "manifest.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.pipeline
def test_good_lines_are_drawn_and_bad_ones_told(
    session: WatchedSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from fp8_compile.cli.engine_settings import EngineSettings
    from fp8_compile.cli.main import app

    monkeypatch.setattr(EngineSettings, "loader", lambda *_: lambda: session)
    prompts = write(
        tmp_path / "prompts.jsonl",
        {"prompt": PROMPT, "seed": 3},
        "no JSON\n",
        "\n",
        {"prompt": PROMPT, "seed": 4, "size": "32x48", "output_format": "webp"},
        {"prompt": PROMPT, "foo": 1},
        {"prompt": PROMPT, "stream": True},
        {"prompt": PROMPT, "n": 2},
        [1],
        {"prompt": PROMPT, "num_inference_steps": 1},
        {"prompt": "two squares"},
    )
    command = ["batch", str(prompts), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    for told in (
        "0 of 9 pictures are in",
        "line 2: it is no JSON",
        "line 5: unknown parameter 'foo'",
        "line 6: stream: of no concern",
        "line 7: n=2: a line is one picture",
        "line 8: expected a JSON object, got '[1]'",
        "line 9: the model made NaN",
        "3 pictures drawn",
        "6 lines have no picture",
    ):
        assert told in done.output, done.output
    entries = {entry["line"]: entry for entry in manifest(tmp_path / "out")}
    assert entries.keys() == {1, 4, 10}
    assert (entries[4]["seed"], entries[4]["size"], entries[4]["prompt"]) == (4, "32x48", PROMPT)
    assert entries[4]["settings"]["num_inference_steps"] == 8
    assert Image.open(tmp_path / "out" / "000004.webp").size == (32, 48)
    direct = session.call(3, **session.arguments(prompt=PROMPT)).images[0]
    assert Image.open(tmp_path / "out" / "000001.png").tobytes() == direct.tobytes()
    before = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    again = CliRunner().invoke(app, command)
    assert "3 of 9 pictures are in" in again.output
    assert "0 pictures drawn" in again.output
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.pipeline
def test_after_a_kill_the_rest_is_drawn_and_each_line_stands_once(tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": PROMPT, "seed": i} for i in range(30)))
    command = [*COMMAND, str(prompts), "--output", str(tmp_path / "out"), *OPTIONS]
    kept: dict[str, bytes] = {}
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        least = len(kept) + 3
        wait_for(lambda least=least: len(manifest(tmp_path / "out")) >= least, 180)  # type: ignore[misc]
        process.kill()
        process.wait()
        kept = {e["file"]: (tmp_path / "out" / e["file"]).read_bytes() for e in manifest(tmp_path / "out")}
    assert 6 <= len(kept) < 30
    subprocess.run(command, check=True, capture_output=True)
    entries = manifest(tmp_path / "out")
    assert sorted(entry["line"] for entry in entries) == list(range(1, 31))
    for entry in entries:
        content = (tmp_path / "out" / entry["file"]).read_bytes()
        assert entry["seed"] == entry["line"] - 1
        assert Image.open(io.BytesIO(content)).size == (64, 64)
        assert kept.get(entry["file"], content) == content


@pytest.mark.slow
@pytest.mark.pipeline
def test_workers_of_a_cluster_draw_each_line_once_whoever_is_killed(tmp_path: Path) -> None:
    """First a worker, then the command itself."""
    lines = [{"prompt": PROMPT, "seed": i, "num_inference_steps": 40} for i in range(30)]
    prompts = write(tmp_path / "prompts.jsonl", *lines, {"prompt": PROMPT, "foo": 1})
    options = [*OPTIONS, "--ray", "--replicas", "2"]
    command = [*COMMAND, str(prompts), "--output", str(tmp_path / "out"), *options]
    with ray_cluster(cpus=2) as cluster:
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log)
        wait_for(lambda: len(manifest(tmp_path / "out")) >= 3 or process.poll() is not None, 180)
        assert process.poll() is None, (tmp_path / "log").read_text()
        workers = cluster.workers("ray::MapWorker")
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        least = len(manifest(tmp_path / "out")) + 3
        wait_for(lambda: len(manifest(tmp_path / "out")) >= least, 60)
        process.kill()
        process.wait()
        kept = {e["file"]: (tmp_path / "out" / e["file"]).read_bytes() for e in manifest(tmp_path / "out")}
        assert 6 <= len(kept) < 30
        done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{len(kept)} of 31 pictures are in" in done.stdout
    assert "line 31: unknown parameter 'foo'" in done.stderr
    assert "1 lines have no picture" in done.stderr
    entries = manifest(tmp_path / "out")
    assert sorted(entry["line"] for entry in entries) == list(range(1, 31))
    for entry in entries:
        content = (tmp_path / "out" / entry["file"]).read_bytes()
        assert entry["seed"] == entry["line"] - 1
        assert kept.get(entry["file"], content) == content


def test_half_a_line_is_cut_off_and_its_picture_drawn_again(tmp_path: Path) -> None:
    lines = [Line(i, f'{{"prompt": "{i}"}}') for i in (1, 2)]
    made = Manifest(tmp_path)
    made.add(lines[0], Made("000001.png", b"one", {"seed": 1}))
    made.add(lines[1], Made("000002.png", b"two", {"seed": 2}))
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = Manifest(tmp_path)
        assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
        assert again.digests.keys() == {1, 2} - set(range(3)[1 + whole[:cut].count(b"\n") :])
    prompts = write(tmp_path / "prompts.jsonl", lines[0].text + "\n", lines[1].text + "\n")
    assert lines_left(prompts, again) == ([lines[1]], 2)
    os.truncate(path, 0)
    assert lines_left(prompts, Manifest(tmp_path)) == (lines, 2)


def test_other_prompts_and_other_files_are_refused(tmp_path: Path) -> None:
    made = Manifest(tmp_path)
    made.add(Line(1, "{}"), Made("000001.png", b"one", {}))
    with pytest.raises(BatchError, match=r"line 1 of .* has changed since its picture was drawn"):
        lines_left(write(tmp_path / "prompts.jsonl", '{"a": 1}\n'), made)
    (tmp_path / "manifest.jsonl").write_text("something else\n")
    with pytest.raises(BatchError, match="is no manifest of pictures"):
        Manifest(tmp_path)
