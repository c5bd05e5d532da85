"""``POST /v1/videos`` over a Wan pipeline, as OpenAI's own client speaks it."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import imageio.v3 as imageio
import numpy as np
import openai
import pytest
import torch
from openai import OpenAI
from PIL import Image

from fp8_compile.pipelines.session import Session
from fp8_compile.serve.engine import Engine
from fp8_compile.serve.orders import Event, Order, Progress, Video
from fp8_compile.serve.protocol import VideoDeleted, VideoJob, VideoRequest
from tests.support.pipelines import build_ltx, build_ltx2, build_wan, sound_in
from tests.support.serving import MODEL, PROMPT, Served, WatchedSession, serving, wait_for

# OpenAI has shut its own service down; others speak its API.
pytestmark = [pytest.mark.pipeline, pytest.mark.filterwarnings("ignore:The Sora API")]

SMALL: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 4, "seed": 3, "fps": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("wan")
    build_wan().save_pretrained(found)
    return found


def watched(session: Session) -> WatchedSession:
    return WatchedSession(**{f.name: getattr(session, f.name) for f in dataclasses.fields(session)})


@pytest.fixture(scope="module")
def wan(folder: Path) -> WatchedSession:
    """As it is, in BF16 and not compiled."""
    return watched(Session.load(str(folder), quantized=False))


@pytest.fixture(scope="module")
def videos(wan: WatchedSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(wan, tmp_path_factory.mktemp("videos"), warmup=[(64, 64)], max_waiting=3) as made:
        yield made


@pytest.fixture
def client(videos: Served) -> OpenAI:
    return videos.openai()


def slow(arguments: dict[str, Any]) -> None:
    """A `WatchedSession.before_call`: each step takes a while."""
    own = arguments["callback_on_step_end"]

    def step(*args: Any) -> Any:
        time.sleep(0.05)
        return own(*args)

    arguments["callback_on_step_end"] = step


def create(videos: Served, **fields: Any) -> httpx.Response:
    return httpx.post(f"{videos.url}/v1/videos", json={"prompt": PROMPT, "size": "64x64", **SMALL, **fields})


def test_a_video_is_made_downloaded_and_deleted(
    videos: Served, client: OpenAI, wan: WatchedSession, tmp_path: Path
) -> None:
    made: Any = client.videos.create_and_poll(
        prompt=PROMPT,
        model=MODEL,
        size="96x64",
        extra_body=SMALL,
        poll_interval_ms=50,  # type: ignore[arg-type]
    )
    assert (made.status, made.progress, made.error, made.object) == ("completed", 100, None, "video")
    assert (made.size, made.seconds, made.num_frames, made.fps, made.seed) == ("96x64", "0.625", 5, 8, 3)
    assert (made.prompt, made.model) == (PROMPT, MODEL)
    assert made.created_at <= made.completed_at < made.expires_at
    content = client.videos.download_content(made.id)
    assert content.response.headers["content-type"] == "video/mp4"
    content.write_to_file(tmp_path / "video.mp4")
    frames = imageio.imread(tmp_path / "video.mp4", plugin="FFMPEG")
    assert frames.shape == (5, 64, 96, 3)
    assert imageio.immeta(tmp_path / "video.mp4", plugin="FFMPEG")["fps"] == 8
    own = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 4}
    direct = wan.call(3, callback_on_step_end=lambda p, i, t, kwargs: kwargs, prompt=PROMPT, **own).frames[0]
    # H.264 loses something: noise, as this pipeline makes, more than a real video.
    assert np.abs(direct * 255 - frames).mean() < 6
    assert next(iter(client.videos.list())).id == made.id
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(made.id)
    assert not list(videos.store.iterdir())


def test_progress_goes_by_steps_and_a_deleted_job_stops_after_its_step(
    videos: Served, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WatchedSession, "before_call", slow)
    first, second = create(videos, num_inference_steps=40).json(), create(videos).json()
    assert (first["status"], second["status"]) == ("queued", "queued")
    assert create(videos).status_code == 200
    assert create(videos).status_code == 200
    full = create(videos)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    seen: list[tuple[str, int]] = []
    steps = videos.metric("steps_total")

    def enough() -> bool:
        job = client.videos.retrieve(first["id"])
        seen.append((job.status, job.progress))
        return job.progress > 20

    wait_for(enough)
    assert seen == sorted(seen, key=lambda each: each[1])
    assert seen[-1][0] == "in_progress"
    with pytest.raises(openai.ConflictError, match="it is in_progress"):
        client.videos.download_content(first["id"])
    client.videos.delete(first["id"])
    listed = [video.id for video in client.videos.list(order="asc", limit=2)]  # pages are followed
    assert len(listed) == 3
    assert listed[0] == second["id"]
    assert [video.id for video in client.videos.list(after=listed[0], order="asc")] == listed[1:]
    for each in listed:
        wait_for(lambda each=each: client.videos.retrieve(each).status == "completed")  # type: ignore[misc]
        client.videos.delete(each)
    assert videos.metric("steps_total") - steps < 40


def test_neither_frames_nor_sizes_compile_anything_after_the_warm_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Session:
        session = Session.load(str(folder), at_load={"strict": True, "min_features": 64})
        session.compile({"inner_backend": "eager"}, dynamic=True)
        return watched(session)

    engine = Engine(load, warmup=[(64, 64)])
    engine.start().result(120)
    # In the engine's thread: such settings are each thread's own.
    monkeypatch.setattr(
        WatchedSession, "before_call", lambda _: setattr(torch._dynamo.config, "error_on_recompile", True)
    )
    try:
        for width, height, frames in ((64, 96, 13), (128, 64, 9), (64, 64, 5)):
            given = {"width": width, "height": height, "num_frames": frames, "num_inference_steps": 2}
            events: queue.SimpleQueue[Event] = queue.SimpleQueue()
            engine.submit(Order(PROMPT, (0,), engine.session.arguments(**given)), events.put)
            assert [events.get(timeout=60) for _ in range(3)] == [Progress(done, 2) for done in range(3)]
            made = events.get(timeout=60)
            assert isinstance(made, Video), made
            assert made.frames.shape == (frames, height, width, 3)
        assert engine.metrics.registry.get_sample_value("fp8_serve_compile_seconds_total") == 0
        assert engine.session.reports()["transformer"].totals["quantized"] == 33
    finally:
        engine.close(10)


@pytest.mark.parametrize(
    ("fields", "message", "code"),
    [
        ({"num_frames": 6}, "num_frames=6: expected a multiple of 4 and one more, such as 5", "invalid_value"),
        ({"num_frames": 1}, "expected a multiple of 4 and one more, such as 5", "invalid_value"),
        ({"num_frames": 401}, "num_frames=401: there are at most 257", "invalid_value"),
        (
            {"num_frames": None, "seconds": "60"},
            "at 8 fps that is 481 frames, and there are at most 257",
            "invalid_value",
        ),
        ({"seconds": "4"}, "seconds and num_frames both set the length", "invalid_value"),
        ({"seconds": "long"}, "expected a number of seconds", "invalid_value"),
        ({"width": 64}, "height is missing", "missing_required_parameter"),
        ({"width": 64, "height": 64}, "size says the same as width and height", "invalid_value"),
        ({"size": "65x64"}, "expected multiples of 16", "invalid_value"),
        ({"flow_shift": 3}, "unknown parameter 'flow_shift'; valid: prompt, model, size", "unknown_parameter"),
        ({"true_cfg_scale": 4.0}, "WanPipeline takes no true_cfg_scale", "invalid_value"),
        ({"input_reference": "x"}, "expected a file, in a form", "invalid_value"),
        ({"num_inference_steps": 1000}, "num_inference_steps=1000: at most 100", "invalid_value"),
        ({"n": 2}, "n=2", "invalid_value"),
        ({"prompt": "word " * 3000}, "tokens: at most 512 are read", "invalid_value"),
    ],
)
def test_what_cannot_be_had_is_named(videos: Served, fields: dict[str, Any], message: str, code: str) -> None:
    answer = create(videos, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["code"] == code
    assert error["param"] in (*fields, "height", "size")


def test_fields_of_the_installed_client_are_all_known() -> None:
    from openai.types import Video, VideoDeleteResponse, video_create_params

    assert set(video_create_params.VideoCreateParams.__annotations__) <= set(VideoRequest.model_fields)
    assert set(Video.model_fields) <= set(VideoJob.model_fields)
    assert set(VideoDeleteResponse.model_fields) <= set(VideoDeleted.model_fields)


def test_forms_and_their_pictures(videos: Served, client: OpenAI, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    with pytest.raises(openai.BadRequestError, match="makes videos from texts alone: WanPipeline takes no image"):
        client.videos.create(prompt=PROMPT, input_reference=tmp_path / "start.png")
    job = client.videos.create(
        prompt=PROMPT, seconds="8", size="64x64", extra_body={"fps": 2, "num_inference_steps": 1}
    )  # type: ignore[arg-type]
    assert (job.seconds, job.num_frames) == ("8.5", 17)  # type: ignore[attr-defined]
    client.videos.poll(job.id, poll_interval_ms=20)
    answer = httpx.get(f"{videos.url}/v1/videos?limit=0")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")
    answer = httpx.get(f"{videos.url}/v1/videos?first=1")
    assert "unknown parameter 'first'; valid: after, limit, order" in answer.json()["error"]["message"]


def test_a_video_begins_with_a_picture(tmp_path: Path) -> None:
    red = tmp_path / "red.png"
    Image.new("RGB", (96, 64), "red").save(red)
    pipe = build_wan(begins_with_a_picture=True)
    session = watched(Session("DIR", pipe, "cpu", {"transformer": pipe.transformer}))
    (tmp_path / "videos").mkdir()
    with serving(session, tmp_path / "videos", warmup=[(64, 64)]) as made:
        client = made.openai()
        with pytest.raises(openai.BadRequestError, match="begins with a picture: send one as input_reference"):
            client.videos.create(prompt=PROMPT)
        job = client.videos.create_and_poll(
            prompt=PROMPT, input_reference=red, poll_interval_ms=50, extra_body={**SMALL, "num_inference_steps": 1}
        )
        assert (job.status, job.size) == ("completed", "96x64"), job.error


def test_another_family_has_other_sizes_lengths_and_rates(tmp_path: Path) -> None:
    pipe = build_ltx()
    session = watched(Session("DIR", pipe, "cpu", {"transformer": pipe.transformer}))
    with serving(session, tmp_path, warmup=[(64, 64)]) as made:
        client = made.openai()
        given: dict[str, Any] = {"prompt": PROMPT, "poll_interval_ms": 50}
        few = {"num_frames": 17, "num_inference_steps": 2}
        job: Any = client.videos.create_and_poll(**given, size="96x64", extra_body=few)
        assert (job.status, job.num_frames, job.fps, job.seconds, job.size) == ("completed", 17, 25, "0.68", "96x64")
        with pytest.raises(openai.BadRequestError, match="expected multiples of 32"):
            client.videos.create(prompt=PROMPT, size="80x64")  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match="expected a multiple of 8 and one more, such as 17"):
            client.videos.create(prompt=PROMPT, extra_body={"num_frames": 16})


def test_a_video_has_its_sound(tmp_path: Path) -> None:
    pipe = build_ltx2()
    session = watched(Session("DIR", pipe, "cpu", {"transformer": pipe.transformer}))
    with serving(session, tmp_path, warmup=[(64, 64)]) as made:
        client = made.openai()
        few = {"num_frames": 9, "num_inference_steps": 2}
        job: Any = client.videos.create_and_poll(prompt=PROMPT, size="64x64", poll_interval_ms=50, extra_body=few)  # type: ignore[arg-type]
        assert job.status == "completed", job.error
        client.videos.download_content(job.id).write_to_file(tmp_path / "video.mp4")
    assert sound_in(tmp_path / "video.mp4").any()


def test_a_video_that_fails_says_why_in_its_job(
    videos: Served, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(arguments: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(WatchedSession, "before_call", broken)
        made = client.videos.poll(create(videos).json()["id"], poll_interval_ms=20)
    assert made.status == "failed"
    assert made.error is not None
    assert (made.error.code, "out of memory" in made.error.message) == ("out_of_memory", True)
    with pytest.raises(openai.ConflictError, match="it failed"):
        client.videos.download_content(made.id)
    client.videos.delete(made.id)


def test_a_job_expires_with_its_file_and_is_its_keys_own(videos: Served, wan: WatchedSession, tmp_path: Path) -> None:
    from fp8_compile.serve import app as http
    from fp8_compile.serve.app import ServerSettings
    from fp8_compile.serve.pictures import PictureStore

    store = PictureStore(tmp_path, seconds=2)
    app = http.create_app(videos.engine, ServerSettings(MODEL, ("one", "two")), store)

    async def talk() -> None:
        transport = httpx.ASGITransport(app)
        one, two = (
            httpx.AsyncClient(transport=transport, base_url="http://x", headers={"authorization": f"Bearer {key}"})
            for key in ("one", "two")
        )
        job = (await one.post("/v1/videos", json={"prompt": PROMPT, "size": "64x64", **SMALL})).json()
        assert (await two.get(f"/v1/videos/{job['id']}")).status_code == 404
        assert (await two.delete(f"/v1/videos/{job['id']}")).status_code == 404
        assert (await two.get("/v1/videos")).json()["data"] == []
        async with asyncio.timeout(20):
            while (found := (await one.get(f"/v1/videos/{job['id']}")).json())["status"] != "completed":
                await asyncio.sleep(0.02)
        assert found["expires_at"] - found["completed_at"] == 2
        assert (await one.get(f"/v1/videos/{job['id']}/content")).status_code == 200
        async with asyncio.timeout(20):
            while (await one.get(f"/v1/videos/{job['id']}/content")).status_code != 404:
                await asyncio.sleep(0.1)
        assert (await one.get("/v1/videos")).json()["data"] == []

    asyncio.run(talk())
    assert not list(tmp_path.iterdir())


def test_a_server_that_ends_does_not_finish_what_nobody_can_fetch(
    wan: WatchedSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WatchedSession, "before_call", slow)
    with serving(wan, tmp_path, warmup=[(64, 64)], grace=60) as ending:
        jobs = [create(ending, num_inference_steps=100).json()["id"] for _ in range(2)]
        wait_for(lambda: ending.openai().videos.retrieve(jobs[0]).status == "in_progress")
        start = time.monotonic()
    assert time.monotonic() - start < 3


def test_a_file_that_cannot_be_stored_fails_its_job(videos: Served, client: OpenAI) -> None:
    moved = videos.store.rename(videos.store.with_name("moved"))
    try:
        made = client.videos.poll(create(videos).json()["id"], poll_interval_ms=20)
    finally:
        moved.rename(videos.store)
    assert made.error is not None
    assert (made.status, made.error.code) == ("failed", "store_failed")
    assert "FileNotFoundError; the server's log tells more" in made.error.message
    client.videos.delete(made.id)


def test_pictures_of_a_video_pipeline_and_videos_of_a_picture_pipeline(videos: Served, served: Served) -> None:
    answer = videos.post({"prompt": PROMPT})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the model makes videos (WanPipeline): POST /v1/videos"
    answer = create(served)
    assert answer.status_code == 400
    expected = "the model draws pictures (QwenImagePipeline): POST /v1/images/generations"
    assert answer.json()["error"]["message"] == expected
