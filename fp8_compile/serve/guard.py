"""What stands in front of every route: keys, a number for each request, time to read it, its line in the access log."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import OptionError
from .metrics import Metrics
from .protocol import ApiError

access_log = logging.getLogger("fp8_compile.serve.access")

MAX_BODY = 2**20
MAX_EDIT_BODY = 50 * 2**20
"""Of a request, in bytes; the second of one that brings pictures."""

OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/v1/images/files/"
"""Answered without a key: the names of files there cannot be guessed."""


def check_access(host: str, keys: Sequence[str], forced: bool) -> None:
    """Refuse to let anybody in from outside.

    Raises:
        OptionError: ``host`` is not this machine alone, and there are no keys; or one of them is empty.
    """
    if not all(key.strip() for key in keys):
        raise OptionError("an API key is empty, which would let everybody in")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not (local or keys or forced):
        raise OptionError(
            f"host={host!r} lets other machines in, and there is no API key: give one, or force it with --no-key"
        )


def largest_body(path: str) -> int:
    """How many bytes a request for ``path`` may have."""
    return MAX_EDIT_BODY if path in ("/v1/images/edits", "/v1/videos") else MAX_BODY


def too_large(path: str) -> ApiError:
    """The answer to a body of more bytes."""
    return ApiError(413, f"the body has more than {largest_body(path)} bytes", code="request_too_large")


class Guard:
    """Wraps an ASGI application.

    Args:
        keys: any of them opens; none: no key is needed.
        body_seconds: how long a client may take to send a request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Sequence[str], body_seconds: float = 30) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = [key.encode() for key in keys]
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, number = time.monotonic(), 0, uuid.uuid4().hex

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, self._in_time(receive), send_and_note)
            else:
                await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, send_and_note)
        finally:
            # A route's pattern, not what was asked for, which would be a counter for each address ever tried.
            path = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - start
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.request_seconds.labels(path).observe(seconds)
            line: dict[str, Any] = {"id": number, "method": scope["method"], "path": path, "status": status}
            access_log.info(json.dumps({**line, "seconds": round(seconds, 4), "client": scope["state"].get("client")}))

    def _refusal(self, scope: Scope) -> ApiError | None:
        """A 401 or a 413, where one is due. Notes whose turn a request takes, and whose videos it sees."""
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else "unknown"
        scope.setdefault("state", {}).update(client=address, owner="")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > largest_body(scope["path"]):
            return too_large(scope["path"])  # longer ones that do not tell their length are cut off by the application
        if not self._keys or scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER):
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        # All are compared, so that the time does not tell which one was nearly right.
        right = [hmac.compare_digest(key.strip().encode(), each) for each in self._keys]
        if kind.lower() == "bearer" and any(right):
            owner = f"key {right.index(True)}"
            scope["state"].update(client=f"{owner} at {address}", owner=owner)
            return None
        message = "expected an API key of this server: 'Authorization: Bearer KEY'"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _in_time(self, receive: Receive) -> Receive:
        """``receive``, which gives up a client that does not send the whole body in time."""
        until = time.monotonic() + self._body_seconds
        complete = False

        async def receive_in_time() -> Message:
            nonlocal complete
            if complete:  # only a disconnection can follow
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request was not complete after {self._body_seconds:g} s") from None
            complete = not message.get("more_body", False)
            return message

        return receive_in_time
