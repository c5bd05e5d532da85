"""Ten thousand requests through the real server and engine, with a pipeline that draws at once."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from fp8_compile.pipelines.session import Session
from fp8_compile.serve.engine import Engine
from fp8_compile.serve.protocol import GenerationRequest
from tests.support.serving import MODEL, PROMPT, WatchedSession, decoded, serving

REQUESTS, CLIENTS = 10_000, 40


class StubSession(WatchedSession):
    """The first pixel of a picture is its seed. The first call takes long enough for the queue to fill."""

    slow = True

    def call(self, seed: Any, **arguments: Any) -> Any:
        if type(self).slow:
            type(self).slow = False
            time.sleep(5)
        latents = torch.zeros(len(seed), 1, 64)
        pipe = SimpleNamespace(num_timesteps=1)
        arguments["callback_on_step_end"](pipe, 0, 0, {"latents": latents})
        pixels = torch.zeros(len(seed), 3, 16, 16)
        for row, each in enumerate(seed):
            pixels[row, :, 0, 0] = torch.tensor([each // 65536, each // 256 % 256, each % 256]) / 255
        return SimpleNamespace(images=pixels)


def load() -> StubSession:
    StubSession.slow = True
    loaded = Session.load(MODEL, quantized=False)
    return StubSession(**{f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)})


@pytest.mark.slow
@pytest.mark.pipeline
@pytest.mark.parametrize("own_process", [False, True])
def test_no_request_is_lost_or_answered_twice(own_process: bool, tmp_path: Path) -> None:
    engine = Engine(load, max_waiting=24, own_process=own_process)
    engine.start().result(120)
    with serving(None, tmp_path, engine=engine) as soaked:

        async def client(http: httpx.AsyncClient, seeds: list[int]) -> Counter[int]:
            statuses: Counter[int] = Counter()
            for seed in seeds:
                while True:
                    body = GenerationRequest(prompt=PROMPT, seed=seed, num_inference_steps=1 + seed % 3)
                    answer = await http.post("/v1/images/generations", json=body.model_dump(exclude_none=True))
                    statuses[answer.status_code] += 1
                    if answer.status_code != 429:
                        break
                    await asyncio.sleep(0.05)
                (item,) = answer.json()["data"]
                red, green, blue = decoded(item["b64_json"]).getpixel((0, 0))  # type: ignore[misc]
                assert item["seed"] == red * 65536 + green * 256 + blue == seed
            return statuses

        async def soak() -> Counter[int]:
            limits = httpx.Limits(max_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=soaked.url, timeout=60, limits=limits) as http:
                shares = [list(range(i, REQUESTS, CLIENTS)) for i in range(CLIENTS)]
                return sum(await asyncio.gather(*(client(http, share) for share in shares)), Counter())

        statuses = asyncio.run(soak())
        assert statuses[200] == REQUESTS
        assert set(statuses) == {200, 429}  # the queue was full at times, and none was lost for that
        assert soaked.metric("pictures_total") == REQUESTS
        assert soaked.metric("waiting_pictures") == 0
    engine.close(10)
