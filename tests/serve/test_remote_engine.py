"""What the ingress makes of workers that die, refuse and fail, of workers that do so when told. See `test_cluster`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from fp8_compile.cli.ray_config import application
from fp8_compile.errors import OptionError
from fp8_compile.serve.cluster import RemoteEngine
from fp8_compile.serve.orders import (
    DrawingError,
    Event,
    Failed,
    NotFiniteError,
    Order,
    Picture,
    Preview,
    Progress,
    QueueFullError,
    UnavailableError,
    Video,
)

IMAGE = Image.new("RGB", (16, 16))


def picture(index: int, seed: int) -> Picture:
    return Picture(index, seed, IMAGE, tokens=1, seconds=0.1)


class Workers:
    """In place of a handle of Ray: each call gives what is next in ``script``, and raises what is an exception."""

    def __init__(self, *script: list[Any]) -> None:
        self._script = list(script)
        self.orders: list[Order] = []
        self.cancelled = 0
        self.draw = self.abilities = SimpleNamespace(remote=self._remote)

    def options(self, stream: bool) -> Workers:
        assert stream
        return self

    def _remote(self, *order: Order) -> Any:
        if not order:
            return asyncio.sleep(0, "abilities")
        self.orders += order
        return _Answers(self, self._script.pop(0))


class _Answers:
    def __init__(self, workers: Workers, events: list[Any]) -> None:
        self._workers = workers
        self._events = events

    async def __aiter__(self) -> AsyncIterator[Any]:
        for event in self._events:
            await asyncio.sleep(0)
            if isinstance(event, Exception):
                raise event
            if event == "hangs":
                await asyncio.Event().wait()
            yield event

    def cancel(self) -> None:
        self._workers.cancelled += 1


def drawn(workers: Workers, seeds: tuple[int, ...] = (5,)) -> list[Event]:
    """The events of an order that is drawn by ``workers``."""

    async def draw(engine: RemoteEngine) -> list[Event]:
        events: list[Event] = []
        ticket = await engine.accept(Order("a circle", seeds), events.append)
        while not ticket.done:
            await asyncio.sleep(0)
        return events

    return in_ingress(workers, draw)


def in_ingress(workers: Workers, action: Callable[[RemoteEngine], Awaitable[Any]]) -> Any:
    async def act() -> Any:
        engine = RemoteEngine(workers)  # type: ignore[arg-type]
        assert not engine.ready
        await asyncio.sleep(0.01)
        assert engine.ready
        return await asyncio.wait_for(action(engine), 10)

    return asyncio.run(act())


@pytest.mark.parametrize("lost", [ActorDiedError(), ActorUnavailableError("away", None), UnavailableError("stopped")])
def test_what_a_lost_worker_has_not_drawn_another_does(lost: Exception) -> None:
    workers = Workers([None, picture(1, 6), lost], [None, picture(1, 7), picture(0, 5)])
    assert drawn(workers, (5, 6, 7)) == [picture(1, 6), picture(2, 7), picture(0, 5)]
    assert [order.seeds for order in workers.orders] == [(5, 6, 7), (5, 7)]


def test_a_video_whose_worker_is_lost_is_made_by_another() -> None:
    made = Video(0, 5, np.zeros((5, 16, 16, 3), np.uint8), None, tokens=1, seconds=0.1)
    begun, half = Progress(0, 2), Progress(1, 2)
    *progress, last = drawn(Workers([None, begun, half, ActorDiedError()], [None, begun, made]))
    assert progress == [begun, half, begun]
    assert isinstance(last, Video)
    assert last.frames is made.frames


def test_an_engine_that_stops_is_a_lost_worker() -> None:
    workers = Workers([None, Failed(UnavailableError("the server's worker has stopped"))], [None, picture(0, 5)])
    assert drawn(workers) == [picture(0, 5)]


def test_two_lost_workers_fail_an_order() -> None:
    (event,) = drawn(Workers([None, ActorDiedError()], [None, ActorDiedError()], [None, picture(0, 5)]))
    assert isinstance(event, Failed)
    assert isinstance(event.error, UnavailableError)


def test_who_has_seen_a_preview_is_not_shown_another_drawing() -> None:
    workers = Workers([None, Preview(0, IMAGE), ActorDiedError()], [None, picture(0, 5)])
    shown, failed = drawn(workers)
    assert shown == Preview(0, IMAGE)
    assert isinstance(failed, Failed)
    assert "lost" in str(failed.error)


def test_a_failure_of_drawing_is_not_repeated() -> None:
    failure = NotFiniteError("NaN")
    (event,) = drawn(Workers([None, Failed(failure)], [None, picture(0, 5)]))
    assert event == Failed(failure)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (BackPressureError(64, 64, 429, 7.5), QueueFullError),
        (DeploymentUnavailableError("Worker"), UnavailableError),  # type: ignore[arg-type]
        (ZeroDivisionError("a bug"), DrawingError),
    ],
)
def test_a_refusal_comes_before_anything_is_sent(raised: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as refused:
        drawn(Workers([raised]))
    assert getattr(refused.value, "retry_after", 8) == 8  # rounded up
    assert "a bug" not in str(refused.value)


def test_who_leaves_stops_the_drawing() -> None:
    workers = Workers([None, "hangs"])

    async def leave(engine: RemoteEngine) -> None:
        ticket = await engine.accept(Order("a circle", (5,)), lambda event: None)
        ticket.cancel()
        while not workers.cancelled:
            await asyncio.sleep(0)

    in_ingress(workers, leave)


def test_who_leaves_while_waiting_stops_the_drawing() -> None:
    workers = Workers(["hangs"])

    async def leave(engine: RemoteEngine) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await engine.accept(Order("a circle", (5,)), lambda event: None)
        while not workers.cancelled:
            await asyncio.sleep(0)

    in_ingress(workers, leave)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({}, "got nothing"),
        ({"options": "", "model": "x"}, "got options, model"),
        ({"options": "--sizes big --no-key"}, "--sizes 'big': expected width and height"),
        ({"options": "--bogus 1"}, "No such option: --bogus"),
        ({"options": "--port 80 --no-key"}, "--host and --port have no place here"),
        ({"options": ""}, "there is no API key"),
    ],
)
def test_a_config_that_is_not_valid_is_refused(
    args: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OptionError) as refused:
        application(args)
    assert told in str(refused.value) + " ".join(capsys.readouterr().err.split())
