"""The HTTP side: FastAPI routes over an `Engine`, and the server that runs them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from .admission import Admission, Admitted, Limits
from .edits import MAX_PICTURES_GIVEN, Edit, read_edit
from .engine import Engine
from .events import Events, api_error
from .guard import MAX_BODY, MAX_EDIT_BODY, Guard, too_large
from .orders import AnyEngine, EngineError, Picture, Preview, Ticket, UnavailableError
from .pictures import MEDIA_TYPES, PictureStore, encoded
from .protocol import (
    ApiError,
    CompletedEvent,
    GenerationRequest,
    ImageItem,
    ImagesResponse,
    Model,
    Models,
    PartialImageEvent,
    PictureRequest,
    State,
    Usage,
    refusal,
)
from .videos import Videos, add_videos

log = logging.getLogger("fp8_compile.serve")

PAGE_MAY = (
    "default-src 'none'; img-src data:; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page in the browser may do: talk to this server and show what it sends."""

SEND_SECONDS = 30
"""How long one event of a stream may take to be sent, to a client that does not read."""


@dataclass(frozen=True)
class ServerSettings:
    """How requests are answered.

    Attributes:
        model: the name of the model in requests and answers.
        keys: of which a request must have one; none: it needs none.
        usual_size: ``(width, height)``, see `Admission`.
        steps: see `Admission`.
        deadline: seconds that a request may take, waiting included.
    """

    model: str
    keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    usual_size: tuple[int, int] | None = None
    steps: int | None = None
    deadline: float = 600.0


class _Images:
    """Answers requests for pictures."""

    def __init__(self, engine: AnyEngine, settings: ServerSettings, store: PictureStore) -> None:
        self._engine = engine
        self._settings = settings
        self._store = store
        self._admission: Admission | None = None

    def admission(self) -> Admission:
        """What the engine's pipeline can be asked for.

        Raises:
            ApiError: it is not ready.
        """
        if not self._engine.ready:
            raise api_error(UnavailableError("the server is not ready"))
        if self._admission is None:
            settings = self._settings
            self._admission = Admission(
                self._engine.abilities, settings.model, settings.limits, settings.usual_size, settings.steps
            )
        return self._admission

    async def answer(self, request: Request, body: PictureRequest, edit: Edit | None = None) -> Response:
        """Draw what ``body`` asks for, for as long as the client waits."""
        admission = self.admission()
        given = ((), None) if edit is None else (edit.images, edit.mask)
        admitted = await run_in_threadpool(admission.admit, body, request.state.client, *given)
        events = Events(self._settings.deadline)
        try:
            ticket = await events.in_time(self._engine.accept(admitted.order, events.put))
        except EngineError as error:
            raise api_error(error) from error
        if body.stream:
            stream = self._stream("image_generation" if edit is None else "image_edit", admitted, ticket, events)

            async def left(message: Any) -> None:  # also before the stream has begun, whose own end would not run then
                ticket.cancel()

            return EventSourceResponse(stream, send_timeout=SEND_SECONDS, client_close_handler_callable=left)
        drawing = asyncio.create_task(self._pictures(admitted, events))
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                return Response(status_code=499)  # nobody reads it, but the access log tells
            pictures = await drawing
        finally:
            ticket.cancel()
            drawing.cancel()
            leaving.cancel()
        return await self._whole(request, body, admitted, pictures)

    async def _pictures(self, admitted: Admitted, events: Events) -> list[Picture]:
        pictures: list[Picture] = []
        while len(pictures) < len(admitted.order.seeds):
            event = await events.next()
            if isinstance(event, Picture):
                pictures.append(event)
        return sorted(pictures, key=lambda picture: picture.index)

    async def _whole(
        self, request: Request, body: PictureRequest, admitted: Admitted, pictures: list[Picture]
    ) -> Response:
        data = []
        for picture in pictures:
            content = await run_in_threadpool(encoded, picture.image, admitted.output_format, admitted.compression)
            drawn: dict[str, Any] = {"seed": picture.seed, "seconds": round(picture.seconds, 4)}
            if body.response_format != "url":
                data.append(ImageItem(b64_json=_base64(content), **drawn))
                continue
            try:
                name = await run_in_threadpool(self._store.put, content, admitted.output_format)
            except OSError as error:
                log.exception("a picture could not be stored")
                message = "the picture could not be stored; ask for response_format='b64_json'"
                raise ApiError(500, message, "response_format", "store_failed") from error
            data.append(ImageItem(url=str(request.url_for("picture_file", name=name)), **drawn))
        answer = ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=admitted.output_format,
            quality=admitted.quality,
            size=_size(pictures[0]),
            safety_identifier=admitted.safety_identifier,
            cache=admitted.cache,
            usage=_usage(admitted, pictures),
        )
        return JSONResponse(answer.model_dump(exclude_none=True))

    async def _stream(
        self, kind: str, admitted: Admitted, ticket: Ticket, events: Events
    ) -> AsyncIterator[ServerSentEvent]:
        try:
            while True:
                event = await events.next()
                assert isinstance(event, Preview | Picture)
                content = await run_in_threadpool(encoded, event.image, admitted.output_format, admitted.compression)
                common: dict[str, Any] = {
                    "b64_json": _base64(content),
                    "created_at": int(time.time()),
                    "output_format": admitted.output_format,
                    "quality": admitted.quality or "auto",
                    "size": _size(event),
                }
                if isinstance(event, Preview):
                    common["type"] = f"{kind}.partial_image"
                    yield _sent(PartialImageEvent(partial_image_index=event.index, **common))
                    continue
                common |= {"type": f"{kind}.completed", "usage": _usage(admitted, [event])}
                common |= {"seed": event.seed, "seconds": round(event.seconds, 4)}
                common |= {"safety_identifier": admitted.safety_identifier, "cache": admitted.cache}
                yield _sent(CompletedEvent(**common))
                return
        except ApiError as error:
            yield ServerSentEvent(event="error", data=json.dumps(error.body()))
        finally:
            ticket.cancel()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _size(drawn: Preview | Picture) -> str:
    return f"{drawn.image.width}x{drawn.image.height}"


def _usage(admitted: Admitted, pictures: list[Picture]) -> Usage:
    n = len(pictures)
    return Usage.of(admitted.text_tokens * n, admitted.given_tokens * n, sum(picture.tokens for picture in pictures))


def _sent(event: PartialImageEvent | CompletedEvent) -> ServerSentEvent:
    return ServerSentEvent(event=event.type, data=event.model_dump_json(exclude_none=True))


async def _disconnected(request: Request) -> None:
    """Wait until the client is gone; its request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(engine: AnyEngine, settings: ServerSettings, store: PictureStore) -> Guard:
    """The ASGI application.

    Args:
        engine: started, perhaps not ready yet.
        store: of pictures that are answered with an address.
    """
    # A stream ends with its picture, also when the server shuts down.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    images, videos = _Images(engine, settings, store), Videos(engine, settings.model, store)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        videos.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, max_body_size=MAX_BODY, lifespan=lifespan)
    model = Model(id=settings.model, created=int(time.time()))

    @app.post("/v1/images/generations")
    async def generations(request: Request, body: GenerationRequest) -> Response:
        return await images.answer(request, body)

    @app.post("/v1/images/edits", max_body_size=MAX_EDIT_BODY)
    async def edits(request: Request) -> Response:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(400, "expected a form with files, multipart/form-data", code="invalid_form")
        async with request.form(max_files=MAX_PICTURES_GIVEN + 1, max_part_size=MAX_BODY) as form:
            edit = await read_edit(form)
        return await images.answer(request, edit.request, edit)

    @app.get("/v1/images/files/{name}", name="picture_file")
    async def picture_file(name: str) -> Response:
        path = store.path(name)
        if path is None:
            raise ApiError(404, "there is no such picture any more", code="not_found")
        headers = {"X-Content-Type-Options": "nosniff"}
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix[1:]], headers=headers)

    add_videos(app, videos, images.admission)

    @app.get("/v1/models")
    async def models() -> Models:
        return Models(data=[model])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        if name != model.id:
            raise ApiError(404, f"there is no model {name!r}; this server has {model.id!r}", "model", "model_not_found")
        return model

    @app.get("/")
    async def page() -> Response:
        return FileResponse(Path(__file__).with_name("page.html"), headers={"Content-Security-Policy": PAGE_MAY})

    @app.get("/health")
    async def health() -> Response:
        return _state(engine, engine.alive, "alive")

    @app.get("/ready")
    async def ready() -> Response:
        return _state(engine, engine.ready, "ready")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    _answer_errors(app)
    return Guard(app, engine.metrics, settings.keys)


def _state(engine: AnyEngine, true: bool, name: str) -> Response:
    cache, weights = (engine.abilities.cache, engine.abilities.weights) if engine.ready else (None, None)
    state = State(status=name if true else f"not {name}", cache=cache, weights=weights)
    return JSONResponse(state.model_dump(exclude_none=True), 200 if true else 503)


def _answer_errors(app: FastAPI) -> None:
    """Let every error be one in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def of_api(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        return await of_api(request, refusal(GenerationRequest, error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 413:
            return await of_api(request, too_large(request.url.path))
        codes = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout"}
        messages = {
            404: f"there is no {request.method} {request.url.path}",
            405: f"{request.url.path} is not for {request.method}",
        }
        message = messages.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return await of_api(request, ApiError(error.status_code, message, None, codes.get(error.status_code), headers))

    @app.exception_handler(Exception)
    async def of_anything(request: Request, error: Exception) -> Response:
        return await of_api(request, ApiError(500, f"{type(error).__name__} in the server; its log tells more"))


KEEP_ALIVE = 75
"""Seconds that an unused connection stays open.

More than clients (httpx and openai: 5) and proxies (nginx: 60) keep theirs. Whoever closes first must be the one that
sends, else a request can meet a connection that is just being closed, and is lost.
"""


class _Server(uvicorn.Server):
    """Finishes what was accepted before it ends, or says that it will not."""

    def __init__(self, app: Guard, engine: Engine, host: str, port: int, grace: float) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(grace) + 10,  # for clients that never read their answer
        )
        super().__init__(config)
        self._engine = engine
        self._grace = grace

    async def shutdown(self, sockets: Any = None) -> None:
        closing = asyncio.create_task(asyncio.to_thread(self._engine.close, self._grace))
        await super().shutdown(sockets)
        await closing


def run(
    engine: Engine,
    settings: ServerSettings,
    host: str,
    port: int,
    grace: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal ends it, or the engine could not start.

    Args:
        engine: not started yet.
        grace: seconds to finish what was accepted.
        on_ready: called once pictures can be drawn.

    Raises:
        BaseException: what the engine could not start for.
    """
    with tempfile.TemporaryDirectory(prefix="fp8-serve-") as folder:
        store = PictureStore(Path(folder))
        server = _Server(create_app(engine, settings, store), engine, host, port, grace)
        started = engine.start()

        def stop_or_tell(_: Any) -> None:
            if started.exception() is None:
                on_ready()
            else:
                server.should_exit = True

        started.add_done_callback(stop_or_tell)
        server.run()
        if started.done():
            started.result()
