"""A worker in a process of its own, which is killed: the server lives, and what it had accepted is drawn."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fp8_compile.errors import Fp8Error
from fp8_compile.pipelines.call_rules import CallError
from fp8_compile.pipelines.session import Session
from fp8_compile.serve import engine as engine_module
from fp8_compile.serve import painter_process
from fp8_compile.serve.engine import Engine
from fp8_compile.serve.orders import EngineError, Event, Failed, Order, Picture
from fp8_compile.serve.painter_process import PainterProcess
from tests.support.serving import MODEL, PROMPT, Served, serving, wait_for

pytestmark = pytest.mark.pipeline


def load() -> Session:
    return Session.load(MODEL, quantized=False)


def load_from_nowhere() -> Session:
    return Session.load("no/such/model", quantized=False)


class DeadlySession(Session):
    """Ends its process where a prompt says so, as a bug in a kernel would, or lets none be loaded any more."""

    def call(self, seed: Any, **arguments: Any) -> Any:
        if any("deadly" in prompt for prompt in arguments["prompt"]):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().call(seed, **arguments)


def load_deadly() -> Session:
    loaded = load()
    return DeadlySession(loaded.model, loaded.pipe, loaded.device, loaded.denoisers)


def order(engine: Engine, pictures: int, steps: int) -> Order:
    return Order(PROMPT, tuple(range(pictures)), engine.abilities.rules.arguments(num_inference_steps=steps))


def pid(engine: Engine) -> int:
    assert isinstance(engine._painter, PainterProcess)
    assert engine._painter.pid is not None
    return engine._painter.pid


def runs(process: int) -> bool:
    """A zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose worker is killed, and killed again."""
    engine = Engine(load_deadly, max_batch=2, max_waiting=16, own_process=True)
    engine.start().result(120)
    try:
        with serving(None, tmp_path_factory.mktemp("pictures"), engine=engine) as made:
            yield made
    finally:
        last = pid(engine)
        engine.close(10)
        wait_for(lambda: not runs(last))


def test_no_accepted_request_is_lost_with_the_worker(served: Served) -> None:
    """One is being drawn, others wait; each gives the picture that it would have been."""
    expected = served.draw(seed=7, num_inference_steps=50)[0].b64_json
    other = served.draw(seed=8, num_inference_steps=4)[0].b64_json
    with ThreadPoolExecutor(5) as pool:
        drawn = pool.submit(served.draw, seed=7, num_inference_steps=50)
        wait_for(lambda: bool(served.engine._tickets) and not served.engine._waiting)
        waiting = [pool.submit(served.draw, seed=8, num_inference_steps=4) for _ in range(2)]
        time.sleep(0.1)
        os.kill(pid(served.engine), signal.SIGKILL)
        wait_for(lambda: not served.engine.ready)
        assert httpx.get(f"{served.url}/ready").status_code == 503
        assert httpx.get(f"{served.url}/health").status_code == 200
        refused = served.post({"prompt": PROMPT})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert drawn.result()[0].b64_json == expected
        assert [each.result()[0].b64_json for each in waiting] == [other] * 2
    assert served.metric("worker_restarts_total") == 1
    assert httpx.get(f"{served.url}/ready").status_code == 200


def test_a_stream_that_has_shown_a_preview_ends_with_an_error(served: Served) -> None:
    body = {"num_inference_steps": 100}
    stream = iter(served.openai().images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=body))
    assert next(stream).type == "image_generation.partial_image"
    os.kill(pid(served.engine), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the worker that drew this was lost"):
        list(stream)
    wait_for(lambda: served.engine.ready)  # also where nothing waits


@pytest.mark.slow
def test_what_kills_each_worker_fails_alone(served: Served) -> None:
    before = served.metric("worker_restarts_total")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(served.draw, num_inference_steps=50)
        wait_for(lambda: bool(served.engine._tickets) and not served.engine._waiting)
        # Of equal settings, so that they are drawn together.
        deadly, innocent = (pool.submit(served.post, {"prompt": prompt}) for prompt in ("deadly", PROMPT))
        assert first.result()
        assert innocent.result().status_code == 200
        answer = deadly.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert served.metric("worker_restarts_total") == before + 2
    assert served.draw()


def test_a_client_that_leaves_is_not_drawn_for(served: Served) -> None:
    steps = served.metric("steps_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/images/generations", json={"prompt": PROMPT, "num_inference_steps": 100}, timeout=0.2
        )
    assert served.draw(num_inference_steps=2)
    assert 0 < served.metric("steps_total") - steps - 2 < 90


def test_a_worker_that_dies_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RESTART_PAUSES", (0.1,))
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine = Engine(load, own_process=True, max_batch=1)
    engine.start().result(120)
    painter = engine._painter
    assert isinstance(painter, PainterProcess)
    painter._arguments = (load_from_nowhere, (), 1)  # as if the model's files were gone
    engine.submit(order(engine, 2, steps=100), events.put)
    os.kill(pid(engine), signal.SIGKILL)
    event = events.get(timeout=60)
    assert isinstance(event, Failed)
    assert "has stopped" in str(event.error)
    wait_for(lambda: not engine.alive)
    assert not engine.ready
    engine.close(1)


def test_an_error_that_nobody_expected_is_sent_by_its_name() -> None:
    class Local(Fp8Error):
        """Cannot be pickled."""

    expected = CallError("no", "prompt")
    assert painter_process._sendable(expected) is expected
    for error in (ZeroDivisionError("a bug"), Local("a bug")):
        sent = painter_process._sendable(error)
        assert type(sent) is EngineError
        assert str(sent) == f"the worker could not start: {type(error).__name__}: a bug"


def test_a_worker_ends_with_its_server(tmp_path: Path) -> None:
    """However that one ends, and whatever the worker is doing."""
    code = """
        import time
        from tests.serve.test_painter_process import load, order
        from fp8_compile.serve.engine import Engine
        if __name__ == "__main__":
            engine = Engine(load, own_process=True, max_batch=1)
            engine.start().result()
            engine.submit(order(engine, 10, steps=100), print)
            print(engine._painter.pid, flush=True)
            time.sleep(100)
    """
    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(code))
    server = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert server.stdout is not None
    worker = int(server.stdout.readline())
    assert runs(worker)
    server.kill()
    server.wait()
    wait_for(lambda: not runs(worker))


@pytest.mark.slow
def test_an_engine_that_ends_finishes_what_it_accepted() -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine = Engine(load, own_process=True, max_batch=1)
    engine.start().result(120)
    engine.submit(order(engine, 3, steps=4), events.put)
    engine.close(60)
    assert all(isinstance(events.get(timeout=1), Picture) for _ in range(3))
