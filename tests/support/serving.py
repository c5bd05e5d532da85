"""A real server on a real port, over the embedded pipeline, whose calls a test can interfere with."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from fp8_compile.pipelines.session import Session
from fp8_compile.serve.app import ServerSettings, _Server, create_app
from fp8_compile.serve.engine import Engine
from fp8_compile.serve.pictures import PictureStore

MODEL = "embedded:qwen-image"
PROMPT = "a red circle on a white background"


class WatchedSession(Session):
    """Calls `before_call` with the arguments of each call, in the engine's thread."""

    before_call: Callable[[dict[str, Any]], None] = staticmethod(lambda arguments: None)

    def call(self, seed: Any, **arguments: Any) -> Any:
        type(self).before_call(arguments)
        return super().call(seed, **arguments)


class Served:
    """A server that runs in this process, and clients for it."""

    def __init__(self, engine: Engine, server: _Server, port: int, key: str | None, store: Path) -> None:
        self.engine = engine
        self.server = server
        self.store = store
        self.url = f"http://127.0.0.1:{port}"
        self.key = key or "unused"

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def draw(self, prompt: str = PROMPT, **body: Any) -> list[Any]:
        """What the synchronous client makes of ``data``."""
        data = self.openai().images.generate(prompt=prompt, extra_body=body).data
        assert data is not None
        return data

    def post(self, json: Any = None, **how: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.key}"} | how.pop("headers", {})
        return httpx.post(f"{self.url}/v1/images/generations", json=json, headers=headers, timeout=60, **how)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {self.key}"} | headers, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(f"fp8_serve_{name}", labels) or 0.0


@contextlib.contextmanager
def serving(
    session: Session | None,
    folder: Path,
    *,
    key: str | None = None,
    grace: float = 10,
    engine: Engine | None = None,
    max_batch: int = 4,
    max_waiting: int = 16,
    warmup: Sequence[tuple[int, int]] = (),
    **settings: Any,
) -> Iterator[Served]:
    """Serve with ``session``, or over an ``engine`` that goes on afterwards."""
    own = engine is None
    engine = engine or Engine(lambda: session, warmup, max_batch, max_waiting)  # type: ignore[arg-type, return-value]
    if own:
        engine.start().result(timeout=120)
    app = create_app(engine, ServerSettings(MODEL, (key,) if key else (), **settings), PictureStore(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = _Server(app, engine, "127.0.0.1", port, grace)
    if not own:
        server.shutdown = lambda sockets=None: uvicorn.Server.shutdown(server, sockets)  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Served(engine, server, port, key, folder)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def decoded(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))
