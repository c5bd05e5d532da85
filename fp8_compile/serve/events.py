"""What the engine says of an order, on its way to whoever asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from ..pipelines.call_rules import CallError
from .orders import (
    Event,
    Failed,
    NotFiniteError,
    OutOfMemoryError,
    Picture,
    Preview,
    Progress,
    QueueFullError,
    UnavailableError,
    Video,
)
from .protocol import ApiError

T = TypeVar("T")


class Events:
    """The events of a ticket, from the engine's thread to the event loop.

    Args:
        deadline: seconds until all must have come; None: there is none.
    """

    def __init__(self, deadline: float | None) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline
        self._until = None if deadline is None else self._loop.time() + deadline

    def put(self, event: Event) -> None:
        """Called by the engine."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def in_time(self, awaited: Awaitable[T]) -> T:
        """What ``awaited`` gives before the deadline.

        Raises:
            ApiError: it does not come in time.
        """
        try:
            async with asyncio.timeout_at(self._until):
                return await awaited
        except TimeoutError:
            message = f"not done after {self._deadline:g} s, the deadline of this server"
            raise ApiError(504, message, code="deadline_exceeded") from None

    async def next(self) -> Preview | Picture | Video | Progress:
        """The next event.

        Raises:
            ApiError: it is a failure, or does not come in time.
        """
        event = await self.in_time(self._queue.get())
        if isinstance(event, Failed):
            raise api_error(event.error)
        return event


def api_error(error: Exception) -> ApiError:
    """What the engine raised, as an answer."""
    if isinstance(error, CallError):
        return ApiError(400, str(error), error.argument, "invalid_value")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), code="unavailable", headers={"Retry-After": "5"})
    codes: dict[type[Exception], str] = {OutOfMemoryError: "out_of_memory", NotFiniteError: "not_finite"}
    return ApiError(500, str(error), code=codes.get(type(error), "drawing_failed"))
