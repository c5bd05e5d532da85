"""What ablations and searches share: the environment of a measurement, values as text and as JSON, writing files."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .quality import Comparison


def number_text(value: float, digits: int) -> str:
    """``value`` with so many digits after the point."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "NaN" if math.isnan(value) else "infinite"


def to_jsonable(value: Any) -> Any:
    """``value`` as JSON gives it back, so that it equals what was read from a file.

    Tuples become lists, keys text; an infinite number becomes None, and NaN the text "NaN". A function becomes the name
    of its module and its own; anything else its text, without addresses, which differ in every process.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else None
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(name): to_jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def quality_to_dict(quality: Comparison) -> dict[str, Any]:
    """The mean, the worst, and every picture, as plain data."""
    return {
        "mean": {metric: to_jsonable(value) for metric, value in quality.mean.items()},
        "worst": {metric: to_jsonable(value) for metric, value in quality.worst.items()},
        "pictures": [{name: to_jsonable(value) for name, value in asdict(row).items()} for row in quality.rows],
    }


def environment(pipeline: Any) -> dict[str, Any]:
    """The device, the versions and the date of a measurement by this process."""
    kind = str(pipeline.device).partition(":")[0]
    return {
        "device": torch.cuda.get_device_name(pipeline.device) if kind == "cuda" else kind,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "fp8-compile": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def write_whole(file: Path, content: str | bytes) -> None:
    """Replace ``file`` in one step, so that a reader sees the old content or the new one; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())
    unfinished.replace(file)


def check_writable(file: Path) -> None:
    """Refuse a ``file`` that could not be written, before any work is done for it; creates nothing.

    Raises:
        OSError: it is a folder, a folder that it is to be in is a file, or writing is not permitted there.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{str(file)!r} is a folder")
    there = file if file.exists() else next(parent for parent in file.absolute().parents if parent.exists())
    if there != file and not there.is_dir():
        raise NotADirectoryError(f"{str(there)!r} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{str(there)!r} may not be written")
