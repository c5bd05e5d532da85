"""``fp8-diffusion generate``: many pictures, pictures from pictures, videos, and pictures that are made again."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from typer.testing import CliRunner, Result

from fp8_compile.cli.main import app
from fp8_compile.pipelines.session import Session
from tests.support.lora_files import TARGETS, write_lora
from tests.support.pipelines import build_ltx, build_ltx2, sound_in

pytestmark = pytest.mark.pipeline

PROMPT = "a large red circle on a white background"
QUICK = ["--inner-backend", "eager", "--steps", "2"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()


def run(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done


def same(a: str, b: str) -> bool:
    return ImageChops.difference(Image.open(a), Image.open(b)).getbbox() is None


def test_a_picture_is_made_again_from_itself_and_the_command_line_wins() -> None:
    run(PROMPT, *QUICK, "--seed", 3, "--ignored-layers", "img_mlp", "--output", "first.png")
    run("--from", "first.png", "--output", "again.png")
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()
    run("--from", "first.png", "--seed", 4, "--output", "other.png")
    assert not same("first.png", "other.png")
    told = run("--from", "first.png", "--no-quantization", "--output", "twin.png")  # over the layers of the file
    assert "unquantized" in told.stdout
    Image.new("RGB", (8, 8)).save("bare.png")
    assert "it does not say what it was made with" in run("--from", "bare.png", status=2).output


def test_one_object_for_many_pictures_and_nothing_else_on_stdout() -> None:
    Path("prompts.txt").write_text(f"{PROMPT}\n\ntwo small blue squares on a yellow background\n")
    done = run("--prompts-file", "prompts.txt", "--seeds", "1,5", *QUICK, "--json", "--batch-size", 3)
    found = json.loads(done.stdout)
    assert [Path(each["path"]).name for each in found["files"]] == [f"out-{i}.png" for i in range(1, 5)]
    assert [each["seed"] for each in found["files"]] == [1, 5, 1, 5]
    assert all(Image.open(each["path"]).size == (each["width"], each["height"]) == (64, 64) for each in found["files"])
    assert found["layers"]["transformer"]["quantized"] == 28
    assert found["attentions"] == {"transformer": {}}
    assert {"load", "encode", "denoise", "decode", "compile", "per_step"} == set(found["seconds"])
    assert found["memory"]["process_peak"] > 0
    run("--from", "out-4.png", "--batch-size", 1, "--output", "again.png", "--quiet")
    assert not same("again.png", "out-3.png")
    told = run("--from", "out-4.png", "--prompts-file", "prompts.txt", "--batch-size", 1, "--output", "both.png").stdout
    assert "wrote both-2.png" in told


@pytest.mark.slow
def test_a_terminal_sees_what_is_loaded_and_compiled(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fp8_compile", "generate", PROMPT, *QUICK, "--output", str(tmp_path / "a.png")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as running:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how the other end says that it is closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert running.returncode == 0, shown
    text = shown.decode()
    assert re.search(r"loading.*\d/17\.9 MB", text), text
    assert "Loading checkpoint shards" not in text
    assert "compiling graph 1: QwenImageTransformerBlock" in text


def test_settings_of_a_file_and_what_is_wrong_with_it() -> None:
    Path("run.toml").write_text(
        f'prompt = "{PROMPT}"\nsteps = 2\ninner-backend = "eager"\noutput = "toml.png"\nquiet = true\n'
    )
    assert run("--config", "run.toml").output == ""
    run(PROMPT, *QUICK, "--output", "line.png")
    assert same("toml.png", "line.png")
    run("--config", "run.toml", "--steps", 3, "--output", "more.png")
    assert not same("toml.png", "more.png")
    for text, message in (
        ("step = 2", "generate has no option 'step'; did you mean 'steps'?"),
        ("steps = [2]", "steps: expected one value, got a list"),
        ("[steps]\na = 1", "steps: expected a value, got a table"),
        ('steps = "two"', "Invalid value for '--steps'"),
        ("quantization = 'fp8'\nno-quantization = true", "--quantization and --no-quantization exclude each other"),
    ):
        Path("bad.toml").write_text(text)
        assert message in run(PROMPT, "--config", "bad.toml", status=2).output


def test_loras_a_scheduler_and_weights_that_become_fp8_while_loading() -> None:
    write_lora(Session.load("embedded:qwen-image").pipe.transformer, Path("style.safetensors"), 1, 4, TARGETS[:2])
    pictures = []
    for i, more in enumerate(
        (
            [],
            ["--lora", "style.safetensors:0"],
            ["--lora", "style.safetensors:2.5"],
            ["--scheduler", "UniPCMultistep"],
            ["--load", "fp8"],
        )
    ):
        torch.compiler.reset()
        told = run(PROMPT, *QUICK, *more, "--output", f"{i}.png").stdout
        assert ("both in memory" in told) == (more != ["--load", "fp8"])
        pictures.append(Image.open(f"{i}.png").tobytes())
    plain, off, on, unipc, loaded = pictures
    assert plain == off
    assert len({plain, on, unipc, loaded}) == 4


def test_a_picture_begins_with_another_one() -> None:
    run(PROMPT, *QUICK, "--output", "red.png")
    blue = ["two small blue squares on a yellow background", "--image", "red.png", "--inner-backend", "eager"]
    run(*blue, "--strength", 0.3, "--steps", 8, "--output", "close.png")
    run(*blue, "--strength", 1, "--steps", 8, "--output", "far.png")

    def difference(file: str) -> float:
        pair = [torch.tensor(list(Image.open(name).tobytes())).float() for name in ("red.png", file)]
        return float((pair[0] - pair[1]).abs().mean())

    assert difference("close.png") < difference("far.png")


def test_a_video_is_written_as_mp4(tmp_path: Path) -> None:
    import imageio.v3 as iio

    build_ltx().save_pretrained(tmp_path / "ltx")
    video: list[Any] = [
        "a wave",
        "--model",
        tmp_path / "ltx",
        "--height",
        64,
        "--width",
        64,
        "--no-quantization",
        *QUICK,
    ]
    assert "the model makes videos, which are written as .mp4" in run(*video, "--output", "a.png", status=2).output
    assert "wrote out.mp4" in run(*video, "--num-frames", 9).stdout
    assert iio.imread("out.mp4").shape[:3] == (9, 64, 64)


def test_a_video_has_its_sound(tmp_path: Path) -> None:
    import imageio.v3 as iio

    from fp8_compile.pipelines.pixels import Sound
    from fp8_compile.serve.pictures import encoded_video

    build_ltx2().save_pretrained(tmp_path / "ltx2")
    size = ["--height", 64, "--width", 64, "--num-frames", 9]
    run("a wave", "--model", tmp_path / "ltx2", *size, "--no-quantization", *QUICK)
    assert sound_in(Path("out.mp4")).any()
    assert iio.immeta("out.mp4", plugin="FFMPEG")["fps"] == 24  # what the pipeline made motion and sound for

    pipe = build_ltx2()
    with torch.no_grad():
        pipe.vocoder.conv_out.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    broken = run("a wave", "--model", tmp_path / "broken", *size, "--no-quantization", *QUICK, status=1)
    assert "the sound of the video has NaN or Inf" in broken.output

    second = np.sin(np.arange(16000) * (2 * np.pi * 440 / 16000))
    wave = (np.stack([second, 0.5 * second], axis=1) * 20000).astype(np.int16)
    file = tmp_path / "tone.mp4"
    file.write_bytes(encoded_video(np.zeros((16, 64, 64, 3), np.uint8), 16, Sound(wave, 16000)))
    heard = sound_in(file)
    assert abs(len(heard) - 16000) < 2048  # whole frames of AAC
    assert [np.abs(np.fft.rfft(channel[:16000])).argmax() for channel in heard.T] == [440, 440]
    left, right = heard.astype(float).std(axis=0)
    assert left / right == pytest.approx(2, rel=0.05)


def test_patterns_of_attentions_hold_for_weights_that_become_fp8_while_loading() -> None:
    options = ["--load", "fp8", "--attention", "fp8-emulated", "--ignored-layers", "0.attn.sdpa", *QUICK, "--json"]
    done = run(PROMPT, *options)
    assert json.loads(done.stdout)["attentions"] == {"transformer": {"as-written": 1, "fp8-emulated": 1}}
    assert "matched n" not in done.stderr


def test_a_picture_that_is_none_names_the_phase(tmp_path: Path) -> None:
    assert "denoising made NaN or Inf in its only step" in run(PROMPT, *QUICK[:2], "--steps", 1, status=1).output
    pipe = Session.load("embedded:qwen-image").pipe
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(-1e4)
    pipe.save_pretrained(tmp_path / "black")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "nan")
    options = [*QUICK, "--height", 64, "--width", 64, "--true-cfg-scale", 1]
    for model, message in (
        ("black", "the picture is black all over, though all its numbers are finite"),
        ("nan", "the decoder (VAE) made NaN or Inf of finite latents"),
    ):
        assert message in run(PROMPT, *options, "--model", tmp_path / model, status=1).output
    assert not list(tmp_path.glob("*.png"))
