"""Pictures of a file of requests, without HTTP: each written once, also after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import Fp8Error
from ..pipelines.session import Session
from .admission import Admission, Admitted, Limits
from .engine import Engine
from .orders import Event, Failed, Order, Picture
from .painter import OnProgress
from .pictures import encoded
from .protocol import ApiError, GenerationRequest, refusal

MANIFEST = "manifest.jsonl"
OF_HTTP = ("stream", "partial_images", "response_format")
"""Fields that say how an answer is sent."""


class BatchError(Fp8Error, ValueError):
    """A file of requests, or a folder of pictures, that cannot be worked with."""


@dataclass(frozen=True)
class Line:
    """A line of the file of requests; ``number`` counts from 1."""

    number: int
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Made:
    """A picture for a line, as it shall be written.

    Attributes:
        entry: of the manifest.
    """

    file: str
    content: bytes
    entry: dict[str, Any]


class Manifest:
    """``manifest.jsonl``: a line for each picture that is there, and nothing else decides what is left to draw.

    A picture is on the disk before its line, which is on the disk before the next one begins. What a killed process
    left behind is half a line at most, which is cut off.

    Args:
        folder: is made if it is not there.

    Raises:
        BatchError: the file holds something else.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / MANIFEST
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self._path, len(whole))
        try:
            entries = [json.loads(line) for line in whole.splitlines()]
            self.digests: dict[int, str] = {entry["line"]: entry["sha256"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise BatchError(f"{str(self._path)!r} is no manifest of pictures: {error!r}") from error

    def add(self, line: Line, made: Made) -> None:
        """Write a picture, then its line."""
        unfinished = self._folder / f".{made.file}.unfinished"
        _write(unfinished, made.content)
        unfinished.replace(self._folder / made.file)
        with self._path.open("ab") as manifest:
            text = json.dumps({"line": line.number, "sha256": line.digest, "file": made.file, **made.entry})
            manifest.write(f"{text}\n".encode())
            manifest.flush()
            os.fsync(manifest.fileno())
        self.digests[line.number] = line.digest


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def lines_left(prompts: Path, manifest: Manifest) -> tuple[list[Line], int]:
    """The lines that have no picture yet, and how many there are in all; empty ones are none.

    Raises:
        BatchError: a line that has a picture is another one now.
    """
    lines = [Line(i, text) for i, text in enumerate(prompts.read_text("utf-8").splitlines(), 1) if text.strip()]
    for line in lines:
        if manifest.digests.get(line.number, line.digest) != line.digest:
            raise BatchError(f"line {line.number} of {str(prompts)!r} has changed since its picture was drawn")
    return [line for line in lines if line.number not in manifest.digests], len(lines)


def drawn(engine: Engine, admission: Admission, lines: Sequence[Line]) -> Iterator[tuple[Line, Made | str]]:
    """Draw ``lines``: each with its picture, or why it has none. As many wait in the engine as fill its batches.

    Args:
        engine: ready.
    """
    events: queue.SimpleQueue[tuple[Line, Admitted, Event]] = queue.SimpleQueue()
    left = iter(lines)
    in_work = 0
    while True:
        asked: list[tuple[Order, Callable[[Event], None]]] = []
        while in_work + len(asked) < 2 * engine.max_batch and (line := next(left, None)) is not None:
            try:
                admitted = admission.admit(_request(line), client="")
            except ApiError as error:
                yield line, error.message
                continue
            asked.append((admitted.order, lambda e, line=line, a=admitted: events.put((line, a, e))))  # type: ignore[misc]
        if asked:
            engine.submit_all(asked)
            in_work += len(asked)
        if not in_work:
            return
        line, admitted, event = events.get()
        in_work -= 1
        if isinstance(event, Failed):
            yield line, str(event.error)
        elif isinstance(event, Picture):
            yield line, _made(line, admitted, event)


@dataclass(frozen=True)
class Work:
    """What draws the lines: an `Engine`, and an `Admission` to it, with their arguments. It can be sent to a worker."""

    load: Callable[[], Session]
    warmup: Sequence[tuple[int, int]]
    max_batch: int
    model: str
    limits: Limits
    steps: int | None

    def begin(self, on_progress: OnProgress = lambda done, total, what: None) -> tuple[Engine, Admission]:
        """Both, once the engine is ready."""
        engine = Engine(self.load, self.warmup, self.max_batch, on_progress=on_progress)
        engine.start().result()
        usual = self.warmup[0] if self.warmup else None
        return engine, Admission(engine.abilities, self.model, self.limits, usual, self.steps)


def _request(line: Line) -> GenerationRequest:
    try:
        given = json.loads(line.text)
    except ValueError as error:
        raise ApiError(400, f"it is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"expected a JSON object, got {line.text[:80]!r}")
    for name in OF_HTTP:
        if given.get(name) is not None:
            raise ApiError(400, f"{name}: of no concern where pictures are written to files")
    try:
        request = GenerationRequest.model_validate(given)
    except ValidationError as error:
        raise refusal(GenerationRequest, error.errors()) from error
    if (request.n or 1) > 1:
        raise ApiError(400, f"n={request.n}: a line is one picture")
    return request


def _made(line: Line, admitted: Admitted, picture: Picture) -> Made:
    order = admitted.order
    entry = {
        "prompt": order.prompt,
        "seed": picture.seed,
        "size": f"{picture.image.width}x{picture.image.height}",
        "settings": dict(order.arguments),
        "lora": dict(order.lora) or None,
        "unquantized": order.unquantized,
        "seconds": round(picture.seconds, 4),
        "time": int(time.time()),
    }
    content = encoded(picture.image, admitted.output_format, admitted.compression)
    return Made(f"{line.number:06}.{admitted.output_format}", content, entry)
