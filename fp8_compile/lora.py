"""Make PEFT's merging visible to version counters.

PEFT fuses an adapter with ``weight.data += delta``, and ``.data`` hides the write from autograd's version counter.
Neither the compiled graph nor the parameter's address need change: fusing a second adapter after the first was unfused
looks exactly like the first. https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py (``merge``)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


def watch_merges() -> None:
    """Count the writes of ``merge`` and ``unmerge`` in all of PEFT's layer classes; does nothing if PEFT is not loaded.

    Called for each compiled graph. An adapter that was merged before the first of those is seen all the same, since a
    new graph compares the weights' values.
    """
    if "peft.tuners.tuners_utils" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for cls in _subclasses(BaseTunerLayer):
        for name in ("merge", "unmerge"):
            method = vars(cls).get(name)
            if method is not None and not hasattr(method, "_counts_writes"):
                setattr(cls, name, _counting(method))


def _subclasses(cls: Any) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _counting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:
            written = [p for p in self.get_base_layer().parameters(recurse=False) if not p.is_inference()]
            torch.autograd.graph.increment_version(written)

    counted._counts_writes = True  # type: ignore[attr-defined]
    return counted
