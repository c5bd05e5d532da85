"""Constants of parameters: made once for each, and made anew when the parameter has changed.

Constants belong to parameters and never to graphs. What is known of a parameter is kept under a weak reference to it
and dies with it.

Whether constants still fit their parameter is asked from what the host knows without touching the device: the
parameter's version counter, address and storage. If one of them has changed, a fingerprint of the values decides, so
that a weight that was offloaded and brought back is not quantized again. New values go into the same memory: a CUDA
graph that has recorded the address reads them.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import NonFiniteWeightError
from ..passes.context import AttentionDecision, Constants, Decision, PassResult, Plan
from ..schemes import MOST_ROWS, Scheme, finite
from ..weights.fingerprint import fingerprint
from ..weights.quantized_weight import QuantizedWeight

logger = logging.getLogger(__name__)

LOCK = threading.RLock()
"""All that is known of weights is shared between threads."""
if hasattr(os, "register_at_fork"):  # in a child, the thread that holds it is not there to let it go
    os.register_at_fork(after_in_child=LOCK._at_fork_reinit)  # type: ignore[attr-defined]

Stamp = tuple[int, int, StorageWeakRef, tuple[int, ...] | None]
"""Version, address, storage, and strides where no guard of Dynamo's tells of them."""


@dataclass(eq=False)
class GraphRecord:
    """One graph that the backend compiled: what was decided for it, and what each pass did.

    Attributes:
        compile_id: Dynamo's identifier of the compilation, as in ``TORCH_LOGS`` and tlparse.
        notes: what its kernels changed for the whole process.
        last: what Dynamo's limit on recompilations means for layers that no graph fits; empty if it is not reached.
        serial: counts the graphs of this process.
    """

    plan: Plan
    passes: Sequence[PassResult]
    compile_id: str
    last: str = ""
    notes: tuple[str, ...] = ()
    serial: int = field(default_factory=itertools.count().__next__)


Kind = tuple[Hashable, bool]
"""The scheme's ``constants_key``, and whether the parameter is transposed; who agrees in it shares constants."""


@dataclass
class Made:
    """Constants of one parameter, and what the parameter was when they were made."""

    scheme: Scheme
    tensors: tuple[Tensor, ...]
    stamp: Stamp
    fingerprint: int


@dataclass
class WeightState:
    """All that is known of one parameter."""

    constants: dict[Kind, Made] = field(default_factory=dict)
    decisions: dict[GraphRecord, list[Decision]] = field(default_factory=dict)
    attentions: dict[GraphRecord, list[AttentionDecision]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for made in self.constants.values() for t in made.tensors)


STATES: Any = WeakTensorKeyDictionary()


def state_of(weight: Tensor) -> WeightState | None:
    """What is known of ``weight``, or None if no compiled graph has run with it."""
    state: WeightState | None = STATES.get(_key(weight))
    return state


def state_for(weight: Tensor) -> WeightState:
    """What is known of ``weight``, from now on."""
    state: WeightState = STATES.setdefault(_key(weight), WeightState())
    return state


def _key(weight: Tensor) -> Any:
    return weight.identity if isinstance(weight, QuantizedWeight) else weight


# Before torch 2.13 a swap of ``.data`` for its transpose changes neither version nor address, and no guard of Dynamo's.
STRIDES_ARE_GUARDED = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


def forget_all() -> None:
    """Drop all constants and decisions: with the compiled graphs gone, nothing reads them."""
    with LOCK:
        STATES.clear()
        _ones.clear()


def forget_weights(weights: Iterable[Tensor]) -> None:
    """Drop the constants of ``weights``, and what was decided on them."""
    with LOCK:
        for weight in weights:
            STATES.pop(_key(weight), None)


def version_of(weight: Tensor) -> int:
    """Its version counter; tensors made in inference mode have none."""
    return -1 if weight.is_inference() else weight._version


def stamp_of(weight: Tensor) -> Stamp:
    """What tells of most changes of ``weight``.

    Of those in which it got another storage twice, at the address of the first, only the storage tells. A weak
    reference to it frees the memory, and keeps what it is compared by from being given to another one.
    """
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    return version_of(weight), weight.data_ptr(), storage, None if STRIDES_ARE_GUARDED else weight.stride()


def is_fake(weight: Tensor) -> bool:
    """Whether ``weight`` has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(weight, FakeTensor)


def _make(scheme: Scheme, weight: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    """The constants of ``weight``, ``[N, K]``, or ``[K, N]`` if ``transposed``, or a stack of such; fake ones if it is
    fake."""
    with torch.no_grad():
        if weight.dim() == 3:
            return scheme.quantize_stack(weight, transposed)
        return scheme.quantize_weight(weight.t().contiguous() if transposed else weight.contiguous())


_ones: dict[torch.device, Tensor] = {}


def ones_on(device: torch.device, like: Tensor) -> Tensor:
    """`ONES` on ``device``; fake ones if ``like`` is fake."""
    if is_fake(like):
        return torch.ones(MOST_ROWS, 1, device=device)
    if device not in _ones:
        with torch.inference_mode(False):
            _ones[device] = torch.ones(MOST_ROWS, 1, device=device)
    return _ones[device]


def _kind(constants: Constants) -> Kind:
    return constants.scheme.constants_key(), constants.transposed


def make_constants(
    weights: Sequence[Tensor], needed: Sequence[Constants], paths: Sequence[str], verify: bool
) -> list[tuple[Tensor, ...]]:
    """The constants that a graph needs, made or made anew where the weights call for it.

    Args:
        weights: the parameters, one for each of ``needed``.
        needed: as the rewrite described them.
        paths: of their layers, for messages.
        verify: compare the values even where version and address say that nothing has changed.

    Raises:
        NonFiniteWeightError: a weight holds NaN or Inf; nothing is kept of it.
    """
    if any(is_fake(w) for w in weights):
        return [_make(c.scheme, w, c.transposed) for w, c in zip(weights, needed, strict=True)]

    # Not inference tensors, whatever the caller's mode: those could not be updated outside of it.
    with torch.inference_mode(False), torch.no_grad():
        doubtful: dict[tuple[int, Kind], Doubtful] = {}
        for weight, constant, path in zip(weights, needed, paths, strict=True):
            known = state_for(weight).constants.get(_kind(constant))
            if verify or known is None or known.stamp != stamp_of(weight):
                doubtful[id(weight), _kind(constant)] = weight, constant, path
        if doubtful:
            _bring_up_to_date(list(doubtful.values()))
    return [state_for(w).constants[_kind(c)].tensors for w, c in zip(weights, needed, strict=True)]


Doubtful = tuple[Tensor, Constants, str]
"""A parameter whose constants may not fit, what is needed of it, and its layer's path."""


def _bring_up_to_date(doubtful: Sequence[Doubtful]) -> None:
    fresh: list[tuple[Doubtful, Made]] = []
    # Before the values are read: a write in between must be seen as one that came later.
    stamps = [stamp_of(weight) for weight, _, _ in doubtful]
    prints = _to_host([fingerprint(weight) for weight, _, _ in doubtful])
    for (weight, constant, path), stamp, value in zip(doubtful, stamps, prints, strict=True):
        known = state_for(weight).constants.get(_kind(constant))
        # A write that was counted counts; the values decide where only the address is new, or all looks as before.
        counted = known is not None and known.stamp[0] != stamp[0]
        if (
            known is not None
            and not counted
            and known.fingerprint == value
            and known.tensors[0].device == weight.device
        ):
            known.stamp = stamp
            continue
        tensors = _make(constant.scheme, weight, constant.transposed)
        fresh.append(((weight, constant, path), Made(constant.scheme, tensors, stamp, value)))

    if fresh:
        all_finite = _to_host([finite(made.tensors) for _, made in fresh])
        broken = [path for ((_, _, path), _), ok in zip(fresh, all_finite, strict=True) if not ok]
        if broken:
            raise NonFiniteWeightError(broken)
    for (weight, constant, path), made in fresh:
        _store(state_for(weight), constant, made)
        logger.debug("quantized the weight of %s (%r)", path, made.scheme)


def _store(state: WeightState, constant: Constants, made: Made) -> None:
    known = state.constants.get(_kind(constant))
    if known is not None and known.tensors[0].device == made.tensors[0].device:
        for old, new in zip(known.tensors, made.tensors, strict=True):
            old.copy_(new)
        made.tensors = known.tensors
        if made.tensors[0].is_cuda:  # another stream, or a graph being replayed, may read them next
            torch.cuda.synchronize(made.tensors[0].device)
    state.constants[_kind(constant)] = made


def _to_host(scalars: Sequence[Tensor]) -> list[Any]:
    """The values of ``scalars``, at the price of a single synchronisation."""
    return torch.stack([s.to(scalars[0].device) for s in scalars]).tolist()


_announced_bytes = 0


def announce_memory() -> None:
    """Say once, and again when it has grown, what the constants take beside the weights."""
    global _announced_bytes
    fp8_bytes = sum(state.nbytes for state in STATES.values())
    if fp8_bytes <= _announced_bytes:
        return
    _announced_bytes = fp8_bytes
    own_bytes = sum(weight.nbytes for weight, state in STATES.items() if state.constants)
    logger.warning(
        "FP8 weights take %.1f MB beside the %.1f MB of the weights that they were made from, which remain part of "
        "the model. To need less, convert fewer layers (ignored_layers); see the page on memory in the documentation.",
        fp8_bytes / 1e6,
        own_bytes / 1e6,
    )


def refresh(model: torch.nn.Module) -> list[str]:
    """Compare every FP8 constant of ``model`` with its weight, and make anew those that no longer fit.

    Needed after an edit that leaves no trace: writing through ``weight.data``, as diffusers' ``EMAModel`` does, or
    through a view of the storage, a collective operation that writes into a parameter, or writing in place into one
    that was made in inference mode, which has no version counter. Not needed after ``load_state_dict``, an in-place
    operation on the parameter, PEFT's merging and unmerging, or moving the model.

    Returns:
        The names of the parameters whose constants were made anew, as in ``model.named_parameters()``.

    Raises:
        NonFiniteWeightError: a weight now holds NaN or Inf.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, for example pipeline.transformer, got {type(model).__name__}")
    changed = []
    with LOCK, torch.inference_mode(False), torch.no_grad():
        for name, weight in model.named_parameters():
            state = state_of(weight)
            if state is None or not state.constants:
                continue
            before = dict(state.constants)
            _bring_up_to_date(
                [
                    (weight, Constants("", made.scheme, transposed, ()), name.removesuffix(".weight"))
                    for (_, transposed), made in before.items()
                ]
            )
            if any(made.fingerprint != before[kind].fingerprint for kind, made in state.constants.items()):
                changed.append(name)
    return changed
