"""Weights that torch.distributed shards, refills and writes into."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn

# The modules in which torch makes shards of a parameter. None of them is on the stack while a model runs.
_SHARDING = frozenset(
    {
        "torch.distributed.fsdp._fully_shard._fsdp_param",
        "torch.distributed.fsdp._flat_param",
        "torch.distributed.tensor._api",
    }
)

_COLLECTIVES = frozenset({"c10d", "c10d_functional", "_c10d_functional"})
# Schemas of c10d do not say what is written: it is the first argument, but of these.
_READING = frozenset({"send", "barrier", "monitored_barrier_", "check_for_nan"})
# Nor do these of the functional ones.
_RECEIVING = frozenset({"irecv", "batch_p2p_ops"})


def refilled(around: Iterable[nn.Module]) -> str | None:
    """Why the weights of a module stay in high precision if FSDP shards it: a reason, or None.

    FSDP fills the same parameters from their shards at each call, in memory that it uses again, and raises no version:
    nothing tells that constants made of them are old.

    Args:
        around: the module, and those that it is in.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in () if fsdp is None else around:
        if isinstance(module, fsdp.FSDPModule):
            return "refilled by FSDP2"
        if isinstance(module, fsdp.FullyShardedDataParallel):
            return "refilled by FSDP"
    return None


def is_being_sharded() -> bool:
    """Whether torch is making shards of a parameter right now."""
    return any(name in sys.modules for name in _SHARDING) and any(
        frame.f_globals.get("__name__") in _SHARDING for frame in stack()
    )


def written_by_collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The tensors that ``func`` writes into if it is a collective operation; most return before they have written."""
    if func.namespace not in _COLLECTIVES:
        return
    name = func._opname
    for i, argument in enumerate(func._schema.arguments):
        marked = argument.alias_info is not None and argument.alias_info.is_write
        first = i == 0 and func.namespace == "c10d" and name not in _READING
        if marked or first or name in _RECEIVING:
            yield from _flat(args[i] if i < len(args) else kwargs.get(argument.name))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _flat(inner)
    else:
        yield value


def stack() -> Iterator[FrameType]:
    """The frames that are being executed, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
