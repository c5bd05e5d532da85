"""Pictures and videos on their way to a client: as bytes of a format, and in files that can be fetched."""

from __future__ import annotations

import io
import re
import secrets
import tempfile
import threading
import time
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ..pipelines.pixels import Sound

MEDIA_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg", "mp4": "video/mp4"}
"""Of the formats that pictures and videos are sent in."""


def encoded(image: Image, output_format: str, compression: int | None) -> bytes:
    """``image`` as a file.

    Args:
        output_format: of `MEDIA_TYPES`.
        compression: of webp and jpeg, Pillow's ``quality``: 100, the default, is the best.
    """
    stream = io.BytesIO()
    quality = {} if output_format == "png" else {"quality": 100 if compression is None else max(1, compression)}
    image.save(stream, output_format, **quality)
    return stream.getvalue()


def encoded_video(frames: NDArray[np.uint8], fps: int, sound: Sound | None) -> bytes:
    """An MP4 file, H.264 and AAC.

    Args:
        frames: ``(frames, height, width, 3)``.
    """
    import imageio.v2 as imageio

    # Of any even size: by default it would be scaled to multiples of 16.
    how: dict[str, Any] = {"fps": fps, "macro_block_size": 1, "ffmpeg_log_level": "error"}
    with tempfile.TemporaryDirectory() as folder:
        path, waves = Path(folder) / "video.mp4", Path(folder) / "sound.wav"
        if sound is not None:
            with wave.open(str(waves), "wb") as file:
                file.setnchannels(sound.samples.shape[1])
                file.setsampwidth(sound.samples.itemsize)
                file.setframerate(sound.rate)
                file.writeframes(sound.samples.tobytes())
            how |= {"audio_path": str(waves), "audio_codec": "aac"}
        writer: Any  # whose type has no append_data
        with imageio.get_writer(path, **how) as writer:
            for frame in frames:
                writer.append_data(frame)
        return path.read_bytes()


class PictureStore:
    """Files that can be fetched for a while by whoever was told their names, which cannot be guessed.

    Args:
        folder: only for these files.
        seconds: how long each is kept.
        limit: bytes of all of them; the oldest make room.
    """

    def __init__(self, folder: Path, seconds: float = 3600, limit: int = 2**30) -> None:
        self._folder = folder
        self.seconds = seconds
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, int]] = {}

    def put(self, content: bytes, output_format: str) -> str:
        """Keep ``content``, and return its name.

        Raises:
            OSError: it cannot be written.
        """
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        try:
            (self._folder / name).write_bytes(content)
        except OSError:
            (self._folder / name).unlink(missing_ok=True)
            raise
        with self._lock:
            self._kept[name] = (time.monotonic() + self.seconds, len(content))
            self._make_room()
        return name

    def path(self, name: str) -> Path | None:
        """The file of this name; None if there is none any more."""
        with self._lock:
            self._make_room()
            return self._folder / name if name in self._kept else None

    def remove(self, name: str) -> None:
        """Forget the file of this name, if there is one."""
        with self._lock:
            self._kept.pop(name, None)
            (self._folder / name).unlink(missing_ok=True)

    def _make_room(self) -> None:
        total = sum(size for _, size in self._kept.values())
        for name, (until, size) in list(self._kept.items()):
            if until > time.monotonic() and total <= self._limit:
                break
            total -= size
            del self._kept[name]
            (self._folder / name).unlink(missing_ok=True)


SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
"""Width and height in pixels, as OpenAI writes them."""


def parse_size(text: str) -> tuple[int, int] | None:
    """Width and height of a text such as "1024x768"; None if it is no such text."""
    found = SIZE.fullmatch(text)
    return None if found is None else (int(found[1]), int(found[2]))
