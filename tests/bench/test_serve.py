"""The open loop of `bench.serve`: what it charges a server that stalls."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bench.serve import poisson, send
from tests.support.serving import wait_for


def test_arrivals_are_the_same_each_time_and_come_at_their_rate() -> None:
    times = poisson(4, 4000, seed=1)
    assert times == poisson(4, 4000, seed=1) != poisson(4, 4000, seed=2)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert 0.24 < statistics.mean(gaps) < 0.26
    assert 0.23 < statistics.stdev(gaps) < 0.27  # as large as the mean: nothing is even about them


def test_who_comes_while_the_server_stalls_is_counted_from_then() -> None:
    calls = 0

    async def draw(request: Request) -> Response:
        nonlocal calls
        calls += 1
        if calls == 6:
            return JSONResponse({}, 429)
        if calls == 1:
            threading.Event().wait(0.5)  # the whole server
        return JSONResponse({})

    app = Starlette(routes=[Route("/v1/images/generations", draw, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        seconds, late, refused = asyncio.run(send(f"http://127.0.0.1:{port}", [0, 0.1, 0.2, 0.3, 0.4, 1, 1.1], 1))
    finally:
        server.should_exit = True
        thread.join(20)
    assert refused == 1
    expected = [0.5, 0.4, 0.3, 0.2, 0.1, 0]
    assert all(abs(found - near) < 0.15 for found, near in zip(seconds, expected, strict=True)), seconds
    assert max(late) < 0.15
