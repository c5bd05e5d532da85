"""``fp8-diffusion serve``, as a process of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import typer
from PIL import Image

from fp8_compile.cli.main import app

pytestmark = pytest.mark.pipeline

COMMAND = [sys.executable, "-m", "fp8_compile", "serve"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_one_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    port = free_port()
    options = [
        "--port",
        port,
        "--inner-backend",
        "eager",
        "--max-batch",
        1,
        "--no-quantization",
        "--sizes",
        "64x64,32x32",
    ]
    command = [*COMMAND, *map(str, options)]
    environment = {**os.environ, "FP8_DIFFUSION_API_KEY": "sesame other"}
    log, access = tmp_path / "log", tmp_path / "access"
    with log.open("w") as errors, access.open("w") as lines:
        server = subprocess.Popen(command, env=environment, stdout=lines, stderr=errors)
    try:
        end = time.monotonic() + 120
        while f"ready: http://127.0.0.1:{port}/v1 serves embedded:qwen-image" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="other", max_retries=0)
        answer = client.images.generate(prompt="a red circle", size="32x32")
        assert answer.data is not None
        assert answer.data[0].b64_json is not None
        assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).size == (32, 32)
        with pytest.raises(openai.BadRequestError, match="size='96x96' is not served; valid: auto, 64x64, 32x32"):
            client.images.generate(prompt="a red circle", size="96x96")
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == -signal.SIGTERM
    finally:
        server.kill()
        server.wait()
    told = log.read_text()
    assert "Traceback" not in told
    assert [json.loads(line)["status"] for line in access.read_text().splitlines()] == [200, 200, 400]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host='0.0.0.0' lets other machines in, and there is no API key"),
        (["--api-key", "sesame", "--api-key", ""], "an API key is empty"),
        (["--sizes", "big"], "--sizes 'big': expected width and height, such as 1024x1024"),
        (["--quantization", "int4"], "method='int4' is not valid"),
        (["--granularity", "row", "--no-quantization"], "--granularity and --no-quantization exclude each other"),
        (["--lora", "name"], "--lora 'name': expected NAME=PATH"),
        (["--lora", "a=no/such/file"], "there is no file 'no/such/file'"),
        (["--compare", "--no-quantization"], "--compare and --no-quantization exclude each other"),
        (["--cache", "tea"], "cache='tea' is not valid; valid: first-block"),
        (["embedded:z-image", "--cache", "first-block"], "tells its transformer nothing of the steps"),
        (["--text-encoder-quantization", "int3"], "method='int3' is not valid"),
        (["--max-loras", "2"], "--max-loras 2: there are 0 adapters (--lora)"),
        (["no/such/model"], "'no/such/model' could not be loaded"),
        (["--activation-scheme", "static"], "this command takes no scales"),
        (["--small-m", "keep"], "small_m='keep': at load time it is not known"),
        (["--compile-cache", "no/such/folder"], "'no/such/folder' has no compiled code"),
        (["--replicas", "2"], "--replicas and --max-replicas need --ray"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "--max-replicas 2 is below --replicas 3"),
    ],
)
def test_what_cannot_be_served_ends_with_a_message(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from fp8_compile.cli import serve

    monkeypatch.setattr(serve, "_set_up_logs", lambda: None)  # of this process, for good
    done = CliRunner().invoke(app, ["serve", "--port", str(free_port()), *arguments])
    assert done.exit_code == (1 if "compiled code" in message else 2), done.output
    assert message in done.output + capfd.readouterr().err


@pytest.mark.parametrize("command", [["serve"], ["batch", __file__, "--output", "out"]])
def test_what_to_install_is_said_where_it_is_not(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "prometheus_client is not installed; this needs: pip install 'fp8-compile[serve]'" in done.output


def test_to_compare_the_unquantized_transformer_is_held_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fp8_compile.cli.engine_settings import EngineSettings
    from fp8_compile.pipelines.session import Session
    from tests.support.lora_files import write_lora

    transformer = Session.load("embedded:qwen-image", quantized=False).pipe.transformer
    write_lora(transformer, tmp_path / "a.safetensors", 1, 4)
    settings = EngineSettings(compare=True, inner_backend="eager", lora=[f"a={tmp_path / 'a.safetensors'}"])
    session = settings.loader(typer.Context(typer.main.get_command(app)), "embedded:qwen-image")()
    told = r"--compare: the transformer in BF16, (\d+\.\d) MB, beside the one in FP8, (\d+\.\d) MB"
    found = re.search(told, capsys.readouterr().err)
    assert found is not None
    assert float(found[1]) > 1.5 * float(found[2])
    twin, pictures = session.twin, []
    assert twin is not None
    assert twin.adapters is not None
    assert session.adapters is not None
    for lora in ((), (("a", 1.0),)):
        twin.adapters.use(lora)
        pictures.append(twin.call(0, **twin.arguments(prompt="x", num_inference_steps=2)).images[0].tobytes())
    assert pictures[0] != pictures[1]


def test_what_a_recipe_keeps_is_kept_and_told(tmp_path: Path) -> None:
    from bench.tiny import build_qwen_image
    from fp8_compile.cli import engine_settings
    from fp8_compile.pipelines.session import Session

    build_qwen_image().save_pretrained(tmp_path)
    assert engine_settings.default_patterns("embedded:qwen-image") == []
    patterns = engine_settings.default_patterns(str(tmp_path))
    session = Session.load(str(tmp_path), at_load={"ignored_layers": patterns})
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr(engine_settings, "tell", told.append)
        engine_settings.tell_kept(session)
    assert told == ["QwenImageTransformer2DModel: keeps img_mlp; --ignored-layers none converts everything"]
