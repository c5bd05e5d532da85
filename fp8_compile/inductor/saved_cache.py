"""What was compiled, in files, for a process that shall compile the same."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from ..errors import Fp8Error
from .source_hash import source_hash

ARTIFACTS, MADE_WITH = "artifacts.bin", "made_with.json"


class SavedCacheError(Fp8Error):
    """A folder of compiled code that cannot be written, or used."""


def save(folder: Path, device: str) -> int:
    """Write what this process has compiled with Inductor, also what it found in a cache, to ``folder``.

    Args:
        folder: is made if it is not there.
        device: what it was compiled for.

    Returns:
        How many bytes that is.

    Raises:
        SavedCacheError: nothing was compiled, or it cannot be written.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise SavedCacheError("Inductor has compiled nothing, so there is nothing to save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ARTIFACTS).write_bytes(saved[0])
        (folder / MADE_WITH).write_text(json.dumps(_made_with(device), indent=2) + "\n")
    except OSError as error:
        raise SavedCacheError(f"compiled code cannot be saved in {str(folder)!r}: {error}") from error
    return len(saved[0])


def load(folder: Path, device: str) -> str | None:
    """Let what is in ``folder`` be found where the same is compiled.

    Returns:
        None; or why it would not be found, in which case nothing is loaded.

    Raises:
        SavedCacheError: `save` has not made it.
    """
    try:
        made_with = json.loads((folder / MADE_WITH).read_text())
        content = (folder / ARTIFACTS).read_bytes()
    except (OSError, ValueError) as error:
        raise SavedCacheError(f"{str(folder)!r} has no compiled code: {error}") from error
    here = _made_with(device)
    other = [
        f"{name}: {made_with.get(name)!r}, here {value!r}"
        for name, value in here.items()
        if made_with.get(name) != value
    ]
    if other:
        return f"it was made with another {'; another '.join(other)}"
    if torch.compiler.load_cache_artifacts(content) is None:
        raise SavedCacheError(f"{str(folder / ARTIFACTS)!r} cannot be read; its log line tells more")
    return None


def _made_with(device: str) -> dict[str, str]:
    """What compiled code depends on, beside the model and its options, which are in the keys of torch's caches."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "source": source_hash(), "device": name, "python": platform.python_version()}
