"""What serving costs over calling the pipeline, and what batches gain; FP8 and BF16 in one run.

Method: the real server on a real port, in this process, its worker in one of its own, and clients in threads. One
client first, in turn with the same call of the pipeline without a server, so that a slow moment of the machine meets
both:

    overhead = (least latency of a request - least time of the call) / least time of the call

The least of many was disturbed least; the medians and quartiles are printed beside it.

The call ends with an encoded PNG, as the answer does, so that the difference is HTTP, JSON, base64, and the ways
between threads and processes. The client is the standard library's: httpx takes a millisecond more, which is not the
server's. ``--in-process`` has the worker in a thread of this process instead.

Then a closed loop: ``--clients`` clients, each of which asks again as soon as it has its picture, with batches and
without. Latencies are over all requests of such a loop; pictures per second are over the whole of it.
"""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Spread, interleave, parser, table, write

if TYPE_CHECKING:
    from fp8_compile.pipelines.session import Session

TARGET = 0.03
PROMPT = "a red circle on a white background"


def load(model: str, fp8: bool, inner_backend: str) -> Session:
    from fp8_compile.pipelines.session import Session

    session = Session.load(model, quantized=fp8, at_load={"strict": True} if fp8 else None)
    session.pipe.set_progress_bar_config(disable=True)
    if fp8:
        session.compile({"inner_backend": inner_backend}, dynamic=True)
    else:
        session.compile_unquantized(inner_backend, dynamic=True)
    return session


class Running:
    """A server over what ``how`` loads.

    Args:
        session: the same in this process, to call without a server.
    """

    def __init__(self, how: partial[Session], session: Session, max_batch: int, own_process: bool, store: Path) -> None:
        import uvicorn

        from fp8_compile.serve.app import ServerSettings, create_app
        from fp8_compile.serve.engine import Engine
        from fp8_compile.serve.pictures import PictureStore

        self._session = session
        self.engine = Engine(how, max_batch=max_batch, own_process=own_process)
        self.engine.start().result()
        app = create_app(self.engine, ServerSettings(session.model), PictureStore(store))
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, access_log=False, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]
        self._own = threading.local()

    def request(self, seed: int, steps: int) -> float:
        """Seconds of one request, over a connection of this thread's own."""
        if not hasattr(self._own, "client"):
            self._own.client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        client = self._own.client
        body = json.dumps({"prompt": PROMPT, "seed": seed, "num_inference_steps": steps})
        start = time.perf_counter()
        client.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
        answer = client.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content.decode()}")
        return time.perf_counter() - start

    def call(self, steps: int) -> float:
        """Seconds of the same picture without a server, called in this thread."""
        from fp8_compile.serve.pictures import encoded

        session = self._session
        start = time.perf_counter()
        image = session.call([0], **session.arguments(prompt=[PROMPT], num_inference_steps=steps)).images[0]
        encoded(image, "png", None)
        return time.perf_counter() - start

    def loop(self, clients: int, requests: int, steps: int) -> dict[str, Any]:
        """``requests`` requests of ``clients`` clients that are never idle."""
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            seconds = sorted(pool.map(lambda seed: self.request(seed, steps), range(requests)))
        whole = time.perf_counter() - start
        percentiles = {f"p{p}": seconds[min(len(seconds) - 1, len(seconds) * p // 100)] for p in (50, 90, 99)}
        return {"clients": clients, "requests": requests, "pictures_per_s": requests / whole, **percentiles}

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.engine.close(10)


def measure(given: Any, fp8: bool) -> dict[str, Any]:
    """All figures of one kind of weights."""
    import torch

    loops = []
    how = partial(load, given.model, fp8, given.inner_backend)
    session = how()
    times: dict[str, list[float]] = {}
    for max_batch in (1, given.max_batch):
        with tempfile.TemporaryDirectory() as folder:
            running = Running(how, session, max_batch, not given.in_process, Path(folder))
            try:
                if max_batch == 1:
                    call, request = partial(running.call, given.steps), partial(running.request, 0, given.steps)
                    times = interleave({"call": call, "request": request}, given.rounds)
                loops.append({"max_batch": max_batch, **running.loop(given.clients, given.requests, given.steps)})
            finally:
                running.close()
    torch.compiler.reset()
    spreads = {name: Spread.of(values) for name, values in times.items()}
    overhead = spreads["request"].least / spreads["call"].least - 1
    return {"alone": spreads, "overhead": overhead, "met": overhead <= TARGET, "loops": loops}


def show(results: dict[str, Any]) -> str:
    rows, verdicts = [], []
    for name, found in results["weights"].items():
        for loop in found["loops"]:
            cells = [f"{loop[key]:.2f}" for key in ("pictures_per_s", "p50", "p90", "p99")]
            rows.append([name, str(loop["clients"]), str(loop["max_batch"]), *cells])
        alone = found["alone"]
        times = ", ".join(f"a {n} {t.text(1000, 1)} ms, least {1000 * t.least:.1f}" for n, t in alone.items())
        verdict = "within" if found["met"] else "NOT within"
        verdicts.append(f"{name}: {times}; overhead {100 * found['overhead']:.1f} %, {verdict} {100 * TARGET:g} %")
    header = ["weights", "clients", "batches of", "pictures/s", "p50 s", "p90 s", "p99 s"]
    return table(header, rows) + "\n" + "\n".join(verdicts)


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--model", default="embedded:qwen-image")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--max-batch", type=int, default=4)
    p.add_argument("--inner-backend", default="inductor")
    p.add_argument("--in-process", action="store_true")
    given = p.parse_args(arguments)
    results = {"weights": {name: measure(given, name == "FP8") for name in ("FP8", "BF16")}}
    print(show(results))
    write(given.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
