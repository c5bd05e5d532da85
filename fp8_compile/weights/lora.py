"""Make PEFT's merging visible to version counters, and its taking an adapter out of an FP8 weight exact.

PEFT fuses an adapter with ``weight.data += delta``, and ``.data`` hides the write from autograd's version counter.
Neither the compiled graph nor the parameter's address need change: fusing a second adapter after the first was unfused
looks exactly like the first. https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py (``merge``)

PEFT takes an adapter out by subtracting it. A `QuantizedWeight` would have been rounded three times by then, with the
steps of the merged weight; so its constants are kept on the host while an adapter is merged, and put back.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .fingerprint import fingerprint
from .quantized_weight import QuantizedWeight


def watch_merges() -> None:
    """Watch ``merge`` and ``unmerge`` in all of PEFT's layer classes; does nothing if PEFT is not loaded.

    Called for each model that is quantized and each compiled graph. An adapter that was merged before the first of
    those is seen all the same, since a new graph compares the weights' values.
    """
    if "peft.tuners.tuners_utils" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for cls in _subclasses(BaseTunerLayer):
        for name in ("merge", "unmerge"):
            method = vars(cls).get(name)
            if method is not None and not hasattr(method, "_is_watched"):
                setattr(cls, name, _watched(method))


def _subclasses(cls: Any) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        _keep_before_merge(self)
        as_merged = _is_as_merged(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            _restore_after_unmerge(self, as_merged)
            written = [p for p in self.get_base_layer().parameters(recurse=False) if not p.is_inference()]
            torch.autograd.graph.increment_version(written)

    watched._is_watched = True  # type: ignore[attr-defined]
    return watched


class _Before:
    """A quantized weight as it was before the first adapter was merged, and the fingerprint of what it has become."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.constants = tuple(constant.to("cpu", copy=True) for constant in weight.constants)
        self.merged: int | None = None


def _base_weight(layer: Any) -> Any:
    return getattr(layer.get_base_layer(), "weight", None)


def _keep_before_merge(layer: Any) -> None:
    """Keep the FP8 weight of a PEFT layer in which nothing is merged."""
    weight = _base_weight(layer)
    if isinstance(weight, QuantizedWeight) and not layer.merged:
        layer._fp8_before_merge = _Before(weight)


def _is_as_merged(layer: Any) -> bool:
    """Whether nothing but PEFT has written into the weight since it was kept."""
    before = vars(layer).get("_fp8_before_merge")
    return before is not None and before.merged == int(fingerprint(_base_weight(layer).constants[0]))


def _restore_after_unmerge(layer: Any, as_merged: bool) -> None:
    """Put the FP8 weight back once nothing is merged any more; ``as_merged`` is what `_is_as_merged` said before."""
    before = vars(layer).get("_fp8_before_merge")
    weight = _base_weight(layer)
    if before is None or not isinstance(weight, QuantizedWeight):
        return
    if layer.merged:
        before.merged = int(fingerprint(weight.constants[0]))
        return
    if as_merged:
        with torch.no_grad():
            for constant, kept in zip(weight.constants, before.constants, strict=True):
                constant.copy_(kept)
    del layer._fp8_before_merge
