"""What identifies this package's code in compile caches."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch


@functools.cache
def source_hash() -> str:
    """A hash of this package's sources and of the CPU's instruction sets that torch uses.

    Compiled code from any other version of the sources must not be found in a cache. Nor code for another CPU, which
    Inductor's own keys let through: written for AVX512 and compiled for AVX2, half of its values are garbage (torch
    2.13, by ``ATEN_CPU_CAPABILITY=avx2`` with a cache of before).
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(torch.backends.cpu.get_cpu_capability().encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
