"""What serving costs over calling the pipeline, and what batches gain; FP8 and BF16 in one run.

Method: the real server on a real port, in this process, its worker in one of its own, and clients in threads. One
client first, in turn with the same call of the pipeline without a server, so that a slow moment of the machine meets
both:

    overhead = (least latency of a request - least time of the call) / least time of the call

The least of many was disturbed least; the medians and quartiles are printed beside it.

The call ends with an encoded PNG, as the answer does, so that the difference is HTTP, JSON, base64, and the ways
between threads and processes. The client is the standard library's: httpx takes a millisecond more, which is not the
server's. ``--in-process`` has the worker in a thread of this process instead. Then, with batches and without:

- a closed loop: ``--clients`` clients, each of which asks again as soon as it has its picture. Latencies are over all
  requests of such a loop; pictures per second are over the whole of it, which is what the server can do. With and
  without batches in turn, so that a slow moment of the machine meets both.
- an open loop for each of ``--rates``: requests arrive as a Poisson process, at times that are drawn before, from
  ``--seed``, the same for all kinds of weights. A client that waits for its answer keeps no other from asking, and a
  latency counts from when the request should have been sent, not from when it was, so that a server that stalls is
  charged for all who would have come meanwhile. Above what the server can do, latencies grow for as long as the loop
  lasts, until its queue refuses requests (429), which are counted apart.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import random
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
TURNS = 3
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

    def set_batch(self, pictures: int) -> None:
        """Draw so many together from now on, while nobody waits."""
        self.engine._abilities = dataclasses.replace(self.engine.abilities, max_batch=pictures)
        self.request(0, 2)  # a batch of the old size may be next: the engine waits for it already

    def closed_loop(self, clients: int, requests: int, steps: int) -> tuple[list[float], float]:
        """Latencies of ``requests`` requests of ``clients`` clients that are never idle, and seconds of the whole."""
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            seconds = list(pool.map(lambda seed: self.request(seed, steps), range(requests)))
        return seconds, time.perf_counter() - start

    def open_loop(self, arrivals: Sequence[float], steps: int) -> dict[str, Any]:
        """A request at each of ``arrivals``, seconds from the beginning, whatever became of the others."""
        seconds, late, refused = asyncio.run(send(f"http://127.0.0.1:{self._port}", arrivals, steps))
        return {
            "requests": len(arrivals),
            "rate": len(arrivals) / arrivals[-1],
            "refused": refused,
            "sent_late_at_most": max(late),
            **percentiles(sorted(seconds)),
        }

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.engine.close(10)


async def send(address: str, arrivals: Sequence[float], steps: int) -> tuple[list[float], list[float], int]:
    """Ask for a picture at each of ``arrivals``.

    Returns:
        Latencies of what was answered, how late each request was sent, in seconds, and how many were refused.
    """
    import httpx

    async def one(client: httpx.AsyncClient, seed: int, due: float) -> tuple[float, float, int]:
        await asyncio.sleep(due - time.perf_counter())
        body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps}
        sent = time.perf_counter()
        answer = await client.post("/v1/images/generations", json=body)
        if answer.status_code != 429:
            answer.raise_for_status()
        return time.perf_counter() - due, sent - due, answer.status_code

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        start = time.perf_counter() + 0.1
        done = await asyncio.gather(*(one(client, seed, start + due) for seed, due in enumerate(arrivals)))
    answered = [latency for latency, _, status in done if status == 200]
    return answered, [late for _, late, _ in done], len(done) - len(answered)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Of sorted ``seconds``."""
    return {f"p{p}": seconds[min(len(seconds) - 1, len(seconds) * p // 100)] for p in (50, 90, 99)}


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """When ``count`` requests arrive, ``rate`` a second on average; the same for the same ``seed``."""
    generator, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += generator.expovariate(rate)
        times.append(now)
    return times


def measure(given: Any, fp8: bool) -> dict[str, Any]:
    """All figures of one kind of weights."""
    batches = (1, given.max_batch)
    closed: dict[int, tuple[list[float], list[float]]] = {batch: ([], []) for batch in batches}
    open_loops = []
    how = partial(load, given.model, fp8, given.inner_backend)
    with tempfile.TemporaryDirectory() as folder:
        running = Running(how, how(), given.max_batch, not given.in_process, Path(folder))
        try:
            call, request = partial(running.call, given.steps), partial(running.request, 0, given.steps)
            times = interleave({"call": call, "request": request}, given.rounds)
            for _ in range(TURNS):
                for batch, (latencies, wholes) in closed.items():
                    running.set_batch(batch)
                    seconds, whole = running.closed_loop(given.clients, given.requests // TURNS, given.steps)
                    latencies += seconds
                    wholes.append(whole)
            for rate in given.rates:
                arrivals = poisson(rate, given.requests, given.seed)
                for batch in batches:
                    running.set_batch(batch)
                    found = running.open_loop(arrivals, given.steps)
                    open_loops.append({"max_batch": batch, "asked_rate": rate, **found})
        finally:
            running.close()
    spreads = {name: Spread.of(values) for name, values in times.items()}
    overhead = spreads["request"].least / spreads["call"].least - 1
    loops = [
        {
            "max_batch": batch,
            "clients": given.clients,
            "requests": len(latencies),
            "pictures_per_s": len(latencies) / sum(wholes),
            **percentiles(sorted(latencies)),
        }
        for batch, (latencies, wholes) in closed.items()
    ]
    return {
        "alone": spreads,
        "overhead": overhead,
        "met": overhead <= TARGET,
        "loops": loops,
        "gain_of_batches": loops[1]["pictures_per_s"] / loops[0]["pictures_per_s"],
        "open_loops": open_loops,
    }


def show(results: dict[str, Any]) -> str:
    rows, open_rows, verdicts = [], [], []
    for name, found in results["weights"].items():
        for loop in found["loops"]:
            cells = [f"{loop[key]:.2f}" for key in ("pictures_per_s", "p50", "p90", "p99")]
            rows.append([name, str(loop["clients"]), str(loop["max_batch"]), *cells])
        for loop in found["open_loops"]:
            cells = [f"{loop[key]:.2f}" for key in ("asked_rate", "rate", "p50", "p90", "p99")]
            open_rows.append([name, str(loop["max_batch"]), *cells, str(loop["refused"])])
        alone = found["alone"]
        times = ", ".join(f"a {n} {t.text(1000, 1)} ms, least {1000 * t.least:.1f}" for n, t in alone.items())
        verdict = "within" if found["met"] else "NOT within"
        verdicts.append(
            f"{name}: {times}; overhead {100 * found['overhead']:.1f} %, {verdict} {100 * TARGET:g} %; batches draw "
            f"{found['gain_of_batches']:.2f} times as many pictures a second"
        )
    header = ["weights", "clients", "batches of", "pictures/s", "p50 s", "p90 s", "p99 s"]
    open_header = ["weights", "batches of", "asked/s", "came/s", "p50 s", "p90 s", "p99 s", "refused"]
    return "\n".join([table(header, rows), "", table(open_header, open_rows), *verdicts])


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--model", default="embedded:qwen-image")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--rates", type=float, nargs="*", default=[1, 2, 4, 8], help="requests a second in open loops")
    p.add_argument("--seed", type=int, default=0, help="of the times of arrival")
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
