"""safetensors files that appear under their name when they are complete and on the disk."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError


def write_tensors(tensors: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str]) -> None:
    """Write a file in a folder beside ``target``, then give it that name.

    A folder, since safetensors makes a scratch file of its own beside the one that it writes.

    Raises:
        CheckpointError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with _scratch(target) as (folder, rights):
            file = folder / target.name
            save_file(dict(tensors), file, metadata=dict(metadata))
            file.chmod(stat.S_IMODE(target.stat().st_mode if target.exists() else rights))
            _to_disk(file)
            os.replace(file, target)
            with contextlib.suppress(OSError):  # the name; not every file system can
                _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be written: {error}", [target]) from error


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[tuple[Path, int]]:
    """A new folder beside ``target``, and the rights that new files get.

    A file in it is locked while its process lives. One that nobody locks is what a killed process left, and goes.
    """
    import fcntl  # not everywhere, where files can be read all the same

    prefix = f".{target.name}-"
    for lock in target.parent.glob(f"{glob.escape(prefix)}*/lock"):
        with contextlib.suppress(OSError), open(lock, "r+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent)
    folder = target.with_name(f"{prefix}{secrets.token_hex(8)}")
    folder.mkdir()
    try:
        with open(folder / "new", "wb") as handle:
            with contextlib.suppress(OSError):  # not every file system can
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.rename(handle.name, folder / "lock")  # locked before it has the name
            yield folder, os.fstat(handle.fileno()).st_mode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
