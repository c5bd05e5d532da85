"""What goes wrong fails what it must, and nothing else; nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from fp8_compile.pipelines.session import Session
from fp8_compile.serve.engine import Engine
from fp8_compile.serve.orders import Order, UnavailableError
from tests.support.serving import PROMPT, Served, WatchedSession, decoded, serving, wait_for

pytestmark = pytest.mark.pipeline


@pytest.fixture
def before_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Sets what happens before each call of the pipeline."""

    def set_to(action: Callable[[dict[str, Any]], None]) -> None:
        monkeypatch.setattr(WatchedSession, "before_call", staticmethod(action))

    return set_to


HEAD = (
    b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


class Gate:
    """Holds the worker back while pictures queue up."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, arguments: dict[str, Any]) -> None:
        self.entered.set()
        assert self.open.wait(60)


@pytest.fixture
def gate(before_call: Any) -> Iterator[Gate]:
    made = Gate()
    before_call(made)
    yield made
    made.open.set()


def test_an_error_of_the_pipeline_fails_its_request_and_tells_nothing_inside(served: Served, before_call: Any) -> None:
    def broken(arguments: dict[str, Any]) -> None:
        raise RuntimeError("a secret of the machine")

    before_call(broken)
    with pytest.raises(openai.InternalServerError) as failed:
        served.draw()
    assert (failed.value.type, failed.value.code) == ("server_error", "drawing_failed")
    assert "RuntimeError" in failed.value.message
    assert "secret" not in failed.value.message
    before_call(lambda arguments: None)
    assert served.draw()


def test_out_of_memory_fails_its_request(served: Served, before_call: Any) -> None:
    def full(arguments: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("2 TiB")

    before_call(full)
    with pytest.raises(openai.InternalServerError) as failed:
        served.draw()
    assert failed.value.code == "out_of_memory"
    before_call(lambda arguments: None)
    assert served.draw()


def at_once(served: Served, prompts: list[str], gate: Gate, **body: Any) -> list[httpx.Response]:
    """Answers to ``prompts`` that wait together behind a first one."""
    with ThreadPoolExecutor(len(prompts) + 1) as pool:
        first = pool.submit(served.post, {"prompt": "first", "num_inference_steps": 3})
        assert gate.entered.wait(20)
        waiting = served.metric("waiting_pictures")
        answers = [pool.submit(served.post, {"prompt": prompt, "seed": 0, **body}) for prompt in prompts]
        wait_for(lambda: served.metric("waiting_pictures") == waiting + len(prompts))
        gate.open.set()
        assert first.result().status_code == 200
        return [answer.result() for answer in answers]


def test_one_broken_picture_of_a_batch_does_not_fail_the_others(
    served: Served, gate: Gate, before_call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def poisoned(arguments: dict[str, Any]) -> None:
        gate(arguments)
        sizes.append(len(arguments["prompt"]))
        if "poison" in arguments["prompt"]:
            raise RuntimeError("cannot draw it")

    before_call(poisoned)
    answers = at_once(served, [PROMPT, "poison", "a blue square"], gate)
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert sizes == [1, 3, 1, 1, 1]  # together, then each alone


def test_nan_is_an_error_and_never_a_black_picture(
    served: Served, session: Session, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one picture in a batch: in its latents, and then in what the VAE makes of good ones."""
    vae = session.pipe.vae
    decode = vae.decode

    def second_is_broken(latents: torch.Tensor, **how: Any) -> Any:
        decoded = decode(latents, **how)
        if len(latents) > 1:
            decoded[0][1, 0, 0, 3, 3] = float("nan")
        return decoded

    monkeypatch.setattr(vae, "decode", second_is_broken)
    answers = at_once(served, [PROMPT, "a blue square", "a green cross"], gate)
    # The second of the batch, which need not be the second that was asked for.
    (broken,) = (answer for answer in answers if answer.status_code != 200)
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "not_finite")
    monkeypatch.undo()
    # This scheduler divides by the number of steps minus one.
    with pytest.raises(openai.InternalServerError) as failed:
        served.draw(num_inference_steps=1)
    assert failed.value.code == "not_finite"


def test_an_error_in_a_stream_is_an_event(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = served.openai().images.generate(prompt=PROMPT, stream=True, extra_body={"num_inference_steps": 1})
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == "not_finite"
    lines = served.post({"prompt": PROMPT, "stream": True, "num_inference_steps": 1}).text.splitlines()
    assert lines[0] == "event: error"
    assert json.loads(lines[1].removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_drawing_between_two_steps(served: Served, stream: bool) -> None:
    pictures, steps = served.metric("pictures_total"), served.metric("steps_total")
    body = {"prompt": PROMPT, "num_inference_steps": 100, "stream": stream, "partial_images": 3 if stream else 0}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{served.url}/v1/images/generations", json=body, timeout=5 if stream else 0.2) as answer,
    ):
        next(answer.iter_lines())  # of a stream the first preview; the other times out
    assert served.draw(num_inference_steps=2)  # drawn after the other one has been given up
    assert served.metric("pictures_total") == pictures + 1
    assert 0 < served.metric("steps_total") - steps - 2 < 90


def test_a_thousand_clients_that_leave_at_once(served: Served, gate: Gate) -> None:
    """They wait in the queue, or are refused because it is full; none of their pictures is drawn."""

    async def leave() -> None:
        port = int(served.url.rpartition(":")[2])
        body = json.dumps({"prompt": PROMPT}).encode()
        head = HEAD % len(body)
        for _ in range(1000):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + body)
            await writer.drain()
            writer.close()

    def answered() -> float:
        path = "/v1/images/generations"
        return sum(served.metric("requests_total", path=path, status=status) for status in ("429", "499"))

    pictures, before = served.metric("pictures_total"), answered()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.draw, num_inference_steps=2)
        assert gate.entered.wait(20)
        asyncio.run(leave())
        wait_for(lambda: answered() == before + 1000)
        gate.open.set()
        assert first.result()
    assert served.draw(num_inference_steps=2)
    assert served.metric("waiting_pictures") == 0
    assert served.metric("pictures_total") == pictures + 2


def test_streams_whose_clients_leave_while_they_wait_are_not_drawn(served: Served, gate: Gate) -> None:
    pictures = served.metric("pictures_total")
    body = json.dumps({"prompt": PROMPT, "stream": True}).encode()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.draw, num_inference_steps=2)
        assert gate.entered.wait(20)
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as leaving:
                leaving.sendall(HEAD % len(body) + body)
                assert leaving.recv(15) == b"HTTP/1.1 200 OK"
        wait_for(lambda: sum(not ticket.done for ticket in served.engine._tickets) == 1)
        gate.open.set()
        assert first.result()
    assert served.draw(num_inference_steps=2)
    assert served.metric("pictures_total") == pictures + 2


def test_a_full_queue_is_429_and_says_when_to_come_again(served: Served, gate: Gate) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(served.draw, num_inference_steps=2)]
        assert gate.entered.wait(20)
        asked += [pool.submit(served.draw, n=8, num_inference_steps=2) for _ in range(2)]
        wait_for(lambda: served.metric("waiting_pictures") == 16)
        with pytest.raises(openai.RateLimitError) as refused:
            served.draw()
        gate.open.set()
        assert [len(each.result()) for each in asked] == [1, 8, 8]
    assert (refused.value.type, refused.value.code) == ("rate_limit_error", "queue_full")
    assert int(refused.value.response.headers["retry-after"]) >= 1


def test_a_connection_stays_open_for_longer_than_clients_keep_it(served: Served) -> None:
    """Else a request can meet its end: httpx, and so the client of OpenAI, gives one up after 5 seconds itself."""
    connection = http.client.HTTPConnection("127.0.0.1", int(served.url.rpartition(":")[2]))
    with contextlib.closing(connection):
        for pause in (6, 0):
            connection.request("GET", "/health")
            with connection.getresponse() as answer:
                assert answer.read()
            time.sleep(pause)


def test_a_deadline_ends_a_request_and_its_drawing(served: Served, session: Session, tmp_path: Path) -> None:
    with serving(session, tmp_path, engine=served.engine, deadline=0.3) as hasty:
        with pytest.raises(openai.InternalServerError) as late:
            hasty.draw(num_inference_steps=100)
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        stream = hasty.openai().images.generate(prompt=PROMPT, stream=True, extra_body={"num_inference_steps": 100})
        with pytest.raises(openai.APIError, match="the deadline of this server"):
            list(stream)
    steps = served.metric("steps_total")
    assert served.draw(num_inference_steps=2)
    assert served.metric("steps_total") - steps < 50


def test_a_full_disk_fails_addresses_and_nothing_else(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(openai.InternalServerError) as failed:
        served.draw(response_format="url")
    assert (failed.value.param, failed.value.code) == ("response_format", "store_failed")
    assert served.draw()


def test_a_client_that_sends_slowly_is_given_up(
    served: Served, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8_compile.serve.guard import Guard

    monkeypatch.setattr(Guard.__init__, "__defaults__", (0.3,))
    with (
        serving(session, tmp_path, engine=served.engine) as impatient,
        socket.create_connection(("127.0.0.1", int(impatient.url.rpartition(":")[2]))) as slow,
    ):
        slow.sendall(HEAD % 20 + b"{")
        slow.settimeout(20)
        answer = ""
        while "}}" not in answer:
            received = slow.recv(4096).decode()
            assert received, answer
            answer += received
    assert answer.startswith("HTTP/1.1 408")
    assert "request_timeout" in answer


def test_a_body_that_is_too_large(served: Served) -> None:
    answer = served.post({"prompt": PROMPT, "user": "x" * 2**20})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"

    def chunks() -> Iterator[bytes]:  # whose length is not announced
        for _ in range(40):
            yield b" " * 2**15

    answer = served.post(content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "how", "status", "code"),
    [
        ("GET", "/v1/nowhere", {}, 404, "not_found"),
        ("GET", "/v1/images/generations", {}, 405, "method_not_allowed"),
        ("POST", "/v1/models", {}, 405, "method_not_allowed"),
        ("POST", "/v1/images/generations", {"content": b"{"}, 400, "invalid_json"),
        ("POST", "/v1/images/generations", {"content": b"[1]"}, 400, "invalid_json"),
        ("POST", "/v1/images/generations", {"content": b""}, 400, "invalid_json"),
        ("POST", "/v1/images/generations", {"content": b"{}"}, 400, "missing_required_parameter"),
        ("POST", "/v1/images/generations", {"data": {"prompt": "a"}}, 400, "invalid_json"),
    ],
)
def test_errors_have_openais_shape(
    served: Served, method: str, path: str, how: dict[str, Any], status: int, code: str
) -> None:
    headers = {"content-type": "application/json"} if "content" in how else {}
    answer = httpx.request(method, served.url + path, headers=headers, **how)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


def test_a_bug_of_the_server_is_a_500_in_the_same_shape(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "submit", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError in the server"):
        served.draw()


def test_keys(served: Served, session: Session, tmp_path: Path) -> None:
    with serving(session, tmp_path, engine=served.engine, key="sesame") as locked:
        assert locked.draw(num_inference_steps=2)
        locked.key = "open"
        with pytest.raises(openai.AuthenticationError) as refused:
            locked.draw()
        assert (refused.value.type, refused.value.code) == ("authentication_error", "invalid_api_key")
        for path in ("/v1/models", "/metrics", "/v1/nowhere"):
            assert httpx.get(locked.url + path).status_code == 401
        for path in ("/", "/health", "/ready"):
            assert httpx.get(locked.url + path).status_code == 200
        for header in ("Bearer", "Basic sesame", "sesame", "Bearer ключ".encode()):
            answer = httpx.get(f"{locked.url}/v1/models", headers={"authorization": header})
            assert answer.status_code == 401
        locked.key = "sesame"
        (linked,) = locked.draw(num_inference_steps=2, response_format="url")
        assert httpx.get(linked.url).status_code == 200  # its name is the key


def test_the_access_log_has_no_prompts(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        served.draw("a very private circle", user="somebody", num_inference_steps=2)
        wait_for(lambda: any(r.name == "fp8_compile.serve.access" for r in caplog.records))
    (line,) = (json.loads(r.getMessage()) for r in caplog.records if r.name == "fp8_compile.serve.access")
    assert line.keys() == {"id", "method", "path", "status", "seconds", "client"}
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/images/generations", 200)
    assert not any(word in caplog.text for word in ("private", "somebody"))


def test_metrics_tell_of_every_phase(served: Served) -> None:
    served.draw(num_inference_steps=2)
    for phase in ("queue", "encode", "denoise", "decode"):
        assert served.metric("phase_seconds_count", phase=phase) > 0
        assert served.metric("phase_seconds_sum", phase=phase) > 0
    exposition = served.get("/metrics").text
    for name in ("waiting_pictures", "pictures_total", "steps_total", "batch_pictures_bucket", "request_seconds_sum"):
        assert f"fp8_serve_{name}" in exposition


def test_a_server_that_ends_finishes_what_it_accepted(session: Session, tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    with serving(session, tmp_path, max_batch=1) as ending, ThreadPoolExecutor(3) as pool:
        gate.open.clear()
        gate.entered.clear()
        asked = [pool.submit(ending.draw, num_inference_steps=2) for _ in range(2)]
        stream = pool.submit(lambda: list(ending.openai().images.generate(prompt=PROMPT, stream=True)))
        wait_for(lambda: ending.metric("waiting_pictures") == 2)
        ending.server.should_exit = True
        wait_for(lambda: not ending.engine.ready)
        with pytest.raises(openai.APIConnectionError):
            ending.draw()
        gate.open.set()
        assert all(decoded(each.result()[0].b64_json) for each in asked)
        assert stream.result()[-1].type == "image_generation.completed"


def test_a_server_without_time_to_finish_says_so(session: Session, tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    with serving(session, tmp_path, grace=0.2) as ending, ThreadPoolExecutor(2) as pool:
        gate.open.clear()
        gate.entered.clear()
        asked = pool.submit(ending.post, {"prompt": PROMPT})
        wait_for(lambda: gate.entered.is_set() and not ending.engine._waiting)
        ending.server.should_exit = True
        answer = asked.result()
        gate.open.set()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert "the time to finish is over" in answer.json()["error"]["message"]


def test_before_it_is_ready_it_says_so(session: Session, tmp_path: Path) -> None:
    loading = threading.Event()

    def load() -> Session:
        assert loading.wait(20)
        return session

    engine = Engine(load, max_batch=1)
    started = engine.start()
    with serving(session, tmp_path, engine=engine) as early:
        assert httpx.get(f"{early.url}/health").status_code == 200
        assert httpx.get(f"{early.url}/ready").status_code == 503
        answer = early.post({"prompt": PROMPT})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        loading.set()
        started.result(60)
        assert httpx.get(f"{early.url}/ready").status_code == 200
        assert early.draw(num_inference_steps=2)
    engine.close(5)
    assert not engine.alive


def test_an_engine_that_cannot_start_tells_why() -> None:
    def load() -> Session:
        raise ValueError("no such model")

    engine = Engine(load)
    with pytest.raises(ValueError, match="no such model"):
        engine.start().result(20)
    assert not engine.ready
    with pytest.raises(UnavailableError, match="not ready"):
        engine.submit(Order(PROMPT, (0,)), print)
