"""Videos are jobs, which OpenAI's client creates, retrieves, lists, downloads and deletes by their ids.

They are kept in memory, their files in the store of pictures, both until they expire.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from .admission import Admission, AdmittedVideo
from .edits import read_video
from .events import Events, api_error
from .guard import MAX_BODY, MAX_EDIT_BODY
from .orders import AnyEngine, EngineError, Progress, Ticket, Video
from .pictures import MEDIA_TYPES, PictureStore, encoded_video
from .protocol import ApiError, VideoDeleted, VideoError, VideoJob, VideoList, VideoRequest, refusal

M = TypeVar("M", bound=BaseModel)

log = logging.getLogger("fp8_compile.serve")

MAX_FINISHED = 1000
"""Jobs that are remembered; the oldest go first. What is not finished the queue of the engine bounds."""

BEGIN_SECONDS = 1.0
"""How long a request for a video waits for a refusal of the queue. Where workers are elsewhere, it may be theirs."""


@dataclass(eq=False)
class _Job:
    """What is known of a video. Not its order, which may hold a picture.

    Attributes:
        owner: whose key it was asked for with; others do not see it.
        file: its name in the store.
    """

    id: str
    owner: str
    prompt: str
    seed: int
    fps: int
    cache: str | None
    size: tuple[int, int] | None
    frames: int | None
    created: float
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    ended: float | None = None
    error: ApiError | None = None
    file: str | None = None
    making: asyncio.Task[None] | None = None

    def fail(self, error: ApiError) -> None:
        self.status, self.error, self.ended = "failed", error, time.time()


class Videos:
    """All jobs of a server. In the event loop.

    Args:
        model: its name in answers.
    """

    def __init__(self, engine: AnyEngine, model: str, store: PictureStore) -> None:
        self._engine = engine
        self._model = model
        self._store = store
        self._jobs: dict[str, _Job] = {}

    async def create(self, admitted: AdmittedVideo, owner: str) -> _Job:
        """A job that the engine has taken, or waits to.

        Raises:
            ApiError: it takes no more.
        """
        order, events = admitted.order, Events(deadline=None)
        accepting = asyncio.ensure_future(self._engine.accept(order, events.put))
        try:
            await asyncio.wait({accepting}, timeout=BEGIN_SECONDS)
            if accepting.done():
                accepting.result()
        except EngineError as error:
            raise api_error(error) from error
        job = _Job(
            f"video_{secrets.token_hex(16)}",
            owner,
            order.prompt,
            order.seeds[0],
            admitted.fps,
            admitted.cache,
            admitted.size,
            admitted.frames,
            time.time(),
        )
        self._jobs[job.id] = job
        job.making = asyncio.create_task(self._make(job, accepting, events))
        return job

    def of(self, owner: str) -> list[_Job]:
        """Those of a key, the oldest first."""
        ended = [job for job in self._jobs.values() if job.ended is not None]
        for i, job in enumerate(sorted(ended, key=lambda job: job.ended or 0, reverse=True)):
            gone = job.file is not None and self._store.path(job.file) is None
            if gone or i >= MAX_FINISHED or time.time() > (job.ended or 0) + self._store.seconds:
                self.forget(job)
        return [job for job in self._jobs.values() if job.owner == owner]

    def one(self, name: str, owner: str) -> _Job:
        """By its id.

        Raises:
            ApiError: there is none, or it is another key's.
        """
        for job in self.of(owner):
            if job.id == name:
                return job
        raise ApiError(404, f"there is no video {name!r} (any more)", "video_id", "not_found")

    def path(self, job: _Job) -> Path | None:
        """The file of ``job``; None while there is none."""
        return None if job.status != "completed" or job.file is None else self._store.path(job.file)

    def forget(self, job: _Job) -> None:
        """Also where it is still made, which ends after the step that is done now."""
        del self._jobs[job.id]
        if job.making is not None:
            job.making.cancel()
        if job.file is not None:
            self._store.remove(job.file)

    def close(self) -> None:
        """Stop what is made: with the server, all jobs are forgotten."""
        for job in list(self._jobs.values()):
            self.forget(job)

    def shown(self, job: _Job) -> VideoJob:
        """As clients see it."""
        error = job.error
        return VideoJob(
            id=job.id,
            model=self._model,
            status=job.status,
            progress=job.progress,
            created_at=int(job.created),
            completed_at=None if job.ended is None or error is not None else int(job.ended),
            expires_at=None if job.ended is None else int(job.ended + self._store.seconds),
            prompt=job.prompt,
            seconds=None if job.frames is None else f"{job.frames / job.fps:.4g}",
            size=None if job.size is None else f"{job.size[0]}x{job.size[1]}",
            error=None if error is None else VideoError(code=error.code, message=error.message, param=error.param),
            seed=job.seed,
            num_frames=job.frames,
            fps=job.fps,
            cache=job.cache,
        )

    async def _make(self, job: _Job, accepting: asyncio.Future[Ticket], events: Events) -> None:
        ticket = None
        try:
            ticket = await accepting
            while not isinstance(event := await events.next(), Video):
                if isinstance(event, Progress):
                    job.status = "in_progress"
                    job.progress = min(99, 100 * event.done // event.steps)
            content = await run_in_threadpool(encoded_video, event.frames, job.fps, event.sound)
            job.file = await run_in_threadpool(self._store.put, content, "mp4")
        except ApiError as error:
            job.fail(error)
        except EngineError as error:
            job.fail(api_error(error))
        except Exception as error:  # nobody else would tell whoever asks for the job
            log.exception("a video could not be stored")
            message = (
                f"the video was made, and could not be stored: {type(error).__name__}; the server's log tells more"
            )
            job.fail(ApiError(500, message, code="store_failed"))
        else:
            frames, height, width, _ = event.frames.shape
            job.frames, job.size = frames, (width, height)
            job.status, job.progress, job.ended = "completed", 100, time.time()
        finally:
            if ticket is not None:
                ticket.cancel()


class _Listing(BaseModel):
    """What ``GET /v1/videos`` may be asked."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


class _Content(BaseModel):
    """What ``GET /v1/videos/ID/content`` may be asked."""

    model_config = ConfigDict(extra="forbid")

    variant: Literal["video"] = "video"


def add_videos(app: FastAPI, videos: Videos, admission: Callable[[], Admission]) -> None:
    """Add the routes of OpenAI's Videos API.

    Args:
        admission: raises an `ApiError` where the engine is not ready.
    """

    @app.post("/v1/videos", max_body_size=MAX_EDIT_BODY)
    async def create(request: Request) -> VideoJob:
        admit = admission().admit_video
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with request.form(max_files=1, max_part_size=MAX_BODY) as form:
                body, image = await read_video(form)
        else:
            body, image = (
                _parsed(VideoRequest, partial(VideoRequest.model_validate_json, strict=True), await request.body()),
                None,
            )
        admitted = await run_in_threadpool(admit, body, request.state.client, image)
        return videos.shown(await videos.create(admitted, request.state.owner))

    @app.get("/v1/videos")
    async def listed(request: Request) -> VideoList:
        asked = _parsed(_Listing, _Listing.model_validate, dict(request.query_params))
        jobs = videos.of(request.state.owner)
        if asked.order == "desc":
            jobs.reverse()
        if asked.after is not None:
            jobs = jobs[jobs.index(videos.one(asked.after, request.state.owner)) + 1 :]
        page = jobs[: asked.limit]
        ends = (page[0].id, page[-1].id) if page else (None, None)
        data = [videos.shown(job) for job in page]
        return VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=len(jobs) > len(page))

    @app.get("/v1/videos/{name}")
    async def retrieve(request: Request, name: str) -> VideoJob:
        return videos.shown(videos.one(name, request.state.owner))

    @app.get("/v1/videos/{name}/content")
    async def content(request: Request, name: str) -> Response:
        _parsed(_Content, _Content.model_validate, dict(request.query_params))
        job = videos.one(name, request.state.owner)
        path = videos.path(job)
        if path is None:
            reason = "it failed" if job.error is not None else f"it is {job.status}"
            raise ApiError(409, f"video {name!r} has no content: {reason}", "video_id", "no_content")
        return FileResponse(path, media_type=MEDIA_TYPES["mp4"], headers={"X-Content-Type-Options": "nosniff"})

    @app.delete("/v1/videos/{name}")
    async def delete(request: Request, name: str) -> VideoDeleted:
        videos.forget(videos.one(name, request.state.owner))
        return VideoDeleted(id=name)


def _parsed(model: type[M], validate: Callable[[Any], M], given: Any) -> M:
    try:
        return validate(given)
    except ValidationError as error:
        raise refusal(model, error.errors()) from error
