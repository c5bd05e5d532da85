"""The binder: from a module's parameters to the FP8 constants that a compiled graph takes.

One compiled graph serves many modules, so constants belong to parameters and never to graphs. What is known of a
parameter is kept under a weak reference to it and dies with it.

Whether constants still fit their parameter is asked at every call, from what the host knows without touching the
device: the parameter's version counter and address. If either has changed, a fingerprint of the values decides, so
that a weight that was offloaded and brought back is not quantized again. New values go into the same memory: a CUDA
graph that has recorded the address reads them.

An `Fp8Weight` holds its constants itself: they are read from it at every call, and there is nothing to make or to
compare. No weak reference to it is kept, because ``torch.utils.swap_tensors``, by which such a parameter is moved to
another device, refuses a tensor that has one. What is known of it hangs on its identity instead, which moves along.
"""

from __future__ import annotations

import gc
import itertools
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import NonFiniteWeightError
from ..passes.plan import Decision, Plan
from ..passes.quantize_linears import Constant
from ..schemes.fp8 import Scheme
from ..weights.quantized_weight import Fp8Weight

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, tuple[int, ...] | None]


@dataclass(eq=False)
class GraphRecord:
    """One graph that the backend compiled: what was decided for it.

    Attributes:
        compile_id: Dynamo's identifier of the compilation, as in ``TORCH_LOGS`` and tlparse.
        serial: counts the graphs of this process.
    """

    plan: Plan
    compile_id: str
    serial: int = field(default_factory=itertools.count().__next__)


Kind = tuple[Callable[[Tensor], tuple[Tensor, ...]], bool]
"""What makes the constants, and whether the parameter is transposed; schemes that agree in it share them."""


def _kind(constant: Constant) -> Kind:
    return constant.scheme.quantize_weight, constant.transposed


@dataclass
class Constants:
    """FP8 constants of one parameter, and what the parameter was when they were made."""

    scheme: Scheme
    tensors: tuple[Tensor, ...]
    stamp: Stamp
    fingerprint: int


@dataclass
class WeightState:
    """All that is known of one parameter."""

    constants: dict[Kind, Constants] = field(default_factory=dict)
    decisions: dict[GraphRecord, list[Decision]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for c in self.constants.values() for t in c.tensors)


_STATES: Any = WeakTensorKeyDictionary()


def state_of(weight: Tensor) -> WeightState | None:
    """What is known of ``weight``, or None if no compiled graph has run with it."""
    state: WeightState | None = _STATES.get(_key(weight))
    return state


def _state(weight: Tensor) -> WeightState:
    state: WeightState = _STATES.setdefault(_key(weight), WeightState())
    return state


def _key(weight: Tensor) -> Any:
    return weight.identity if isinstance(weight, Fp8Weight) else weight


# Before torch 2.13 a swap of ``.data`` for its transpose changes neither version nor address, and no guard of Dynamo's.
_STRIDES_ARE_GUARDED = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


def forget_all() -> None:
    """Drop all constants and decisions: with the compiled graphs gone, nothing reads them."""
    with _LOCK:
        _STATES.clear()


def _stamp(weight: Tensor) -> Stamp:
    # Tensors made in inference mode have no version counter: there, only a new address tells of a change.
    version = -1 if weight.is_inference() else weight._version
    return version, weight.data_ptr(), None if _STRIDES_ARE_GUARDED else weight.stride()


# Words hashed at a time: what bounds the memory that hashing a large weight takes, 8 bytes a word and a few of them.
_CHUNK = 1 << 22


def fingerprint(weight: Tensor) -> Tensor:
    """A 64-bit hash of the values of ``weight`` and their places, computed on its device.

    Each word of bits is mixed with its place by the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), and the results are added modulo 2**64. Without the mixing, an even
    number of sign flips would cancel out: the sign is the highest bit of a word, and twice that is 0.

    Args:
        weight: any shape, any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        int64, without dimensions.
    """
    flat = weight.detach().contiguous().view(-1)
    word = next(t for t in (torch.int64, torch.int16, torch.int8) if flat.numel() * flat.itemsize % t.itemsize == 0)
    if flat.data_ptr() % word.itemsize:
        flat = flat.clone()
    bits = flat.view(word)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
        total += _mix(chunk ^ _mix(place)).sum()
    return total


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ _logical_shift(x, shift)) * factor
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def make_constants(weights: Sequence[Tensor], needed: Sequence[Constant], verify: bool) -> list[tuple[Tensor, ...]]:
    """The constants that a graph needs, made or made anew where the weights call for it.

    Args:
        weights: the parameters, one for each of ``needed``.
        needed: as the rewrite described them.
        verify: compare the values even where version and address say that nothing has changed.

    Raises:
        NonFiniteWeightError: a weight holds NaN or Inf; nothing is kept of it.
    """
    if any(_is_fake(w) for w in weights):
        return [c.scheme.make_constants(w, c.transposed) for w, c in zip(weights, needed, strict=True)]

    # Not inference tensors, whatever the caller's mode: those could not be updated outside of it.
    with torch.inference_mode(False), torch.no_grad():
        doubtful: dict[tuple[int, Kind], tuple[Tensor, Constant]] = {}
        for weight, constant in zip(weights, needed, strict=True):
            known = _state(weight).constants.get(_kind(constant))
            if verify or known is None or known.stamp != _stamp(weight):
                doubtful[id(weight), _kind(constant)] = weight, constant
        if doubtful:
            _bring_up_to_date(list(doubtful.values()))
    return [_state(w).constants[_kind(c)].tensors for w, c in zip(weights, needed, strict=True)]


def _bring_up_to_date(doubtful: Sequence[tuple[Tensor, Constant]]) -> None:
    fresh: list[tuple[Tensor, Constant, Constants]] = []
    # Before the values are read: a write in between must be seen as one that came later.
    stamps = [_stamp(weight) for weight, _ in doubtful]
    prints = _to_host([fingerprint(weight) for weight, _ in doubtful])
    for (weight, constant), stamp, value in zip(doubtful, stamps, prints, strict=True):
        known = _state(weight).constants.get(_kind(constant))
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
        tensors = constant.scheme.make_constants(weight, constant.transposed)
        fresh.append((weight, constant, Constants(constant.scheme, tensors, stamp, value)))

    if fresh:
        finite = _to_host([_all_finite(made.tensors) for _, _, made in fresh])
        broken = [constant.path for (_, constant, _), ok in zip(fresh, finite, strict=True) if not ok]
        if broken:
            raise NonFiniteWeightError(broken)
    for weight, constant, made in fresh:
        _store(_state(weight), constant, made)


def _store(state: WeightState, constant: Constant, made: Constants) -> None:
    known = state.constants.get(_kind(constant))
    if known is not None and known.tensors[0].device == made.tensors[0].device:
        for old, new in zip(known.tensors, made.tensors, strict=True):
            old.copy_(new)
        made.tensors = known.tensors
        if made.tensors[0].is_cuda:  # another stream, or a graph being replayed, may read them next
            torch.cuda.synchronize(made.tensors[0].device)
    state.constants[_kind(constant)] = made
    logger.debug("quantized the weight of %s (%s)", constant.path, constant.scheme.name)


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    # A NaN or Inf of the weight reaches its scale through the amax; so the scales tell, and they are small.
    told = [t.isfinite().all() for t in tensors if t.is_floating_point() and t.itemsize > 1]
    return torch.stack(told).all() if told else torch.ones((), dtype=torch.bool)


def _to_host(scalars: Sequence[Tensor]) -> list[Any]:
    """The values of ``scalars``, at the price of a single synchronisation."""
    return torch.stack([s.to(scalars[0].device) for s in scalars]).tolist()


def _is_fake(weight: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(weight, FakeTensor)


Read = Callable[[tuple[Tensor, ...]], list[Any]]


@dataclass
class _Instance:
    """A module that has run through a graph, by its weights.

    Attributes:
        constants: made of them.
        read: what tells them, and changes of them, apart; compared at every call, so as little as will do.
        seen: what ``read`` returned when the constants were last known to fit; None before that.
    """

    constants: tuple[Tensor, ...]
    read: Read
    seen: list[Any] | None = None


class BoundGraph:
    """A compiled graph that takes the arguments of the original one.

    Dynamo calls it with the parameters of whichever module is running; it hands the constants of those to the compiled
    code in place of the weights.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        record: GraphRecord,
        constants: Sequence[Constant],
        arguments: Sequence[str],
        kept_arguments: Sequence[str],
    ) -> None:
        """
        Args:
            compiled: takes ``kept_arguments``, then the tensors of ``constants``, those first that parameters hold.
            arguments: names of the original graph's placeholders, in order.
            kept_arguments: those of them that the rewritten graph still takes, in order.
        """
        place = {name: i for i, name in enumerate(arguments)}
        tracked = [d for d in record.plan.decisions if d.weight is not None and d.tracked]
        self._compiled = compiled
        self._record = record
        self._constants = tuple(c for c in constants if not c.held)
        self._held = _getter([place[c.weight] for c in constants if c.held])
        self._tracked = [(place[d.weight], d) for d in tracked if d.weight is not None]
        if self._constants:
            self._weights = _getter([place[c.weight] for c in self._constants])
        else:
            weights = _getter(sorted({i for i, _ in self._tracked}))
            self._weights = lambda args: tuple(map(_plain, weights(args)))
        self._kept = _getter([place[name] for name in kept_arguments])
        self._instances: dict[tuple[int, ...], _Instance] = {}
        # The same by the first weight alone: a guess that ``seen`` confirms. Few modules share it and not the rest.
        self._guesses: dict[int, _Instance] = {}
        self._swept = False

    def __call__(self, *args: Any) -> Any:
        weights = self._weights(args)
        instance = self._guesses.get(id(weights[0]))
        try:
            fits = instance is not None and instance.seen == instance.read(weights)
        except RuntimeError:  # ``.data`` has been given an inference tensor, which has no version
            fits = False
        if instance is None or not fits:
            with _LOCK:
                instance = self._bind(args, weights)
        held = [tensor for weight in self._held(args) for tensor in (weight.qdata, weight.scale)]
        return self._compiled(*self._kept(args), *held, *instance.constants)

    def _bind(self, args: tuple[Any, ...], weights: tuple[Tensor, ...]) -> _Instance:
        key = tuple(map(id, weights))
        instance = self._instances.get(key)
        fake = any(_is_fake(w) for w in weights)
        read = _addresses if fake else _reader(weights) if self._constants else _identities
        seen = None if fake else read(weights)
        made = make_constants(weights, self._constants, verify=instance is None) if self._constants else []
        flat = tuple(tensor for tensors in made for tensor in tensors)
        if fake:
            return _Instance(flat, read)
        if not self._swept:
            self._swept = True
            if any(isinstance(arg, Fp8Weight) for arg in args):
                # What Dynamo needed for compiling refers weakly to the parameters, and is garbage in cycles by now. As
                # long as it is there, such parameters cannot be moved, as group offloading does right after this call.
                gc.collect()
        if instance is None:
            # With nothing seen, the second call comes here again: by then every module has run once, and the sum is
            # known.
            instance = self._instances[key] = _Instance(flat, read)
            self._remember(args, weights)
        else:
            if instance.seen is None:
                _announce_memory()
            instance.constants, instance.read, instance.seen = flat, read, seen
        self._guesses[key[0]] = instance
        return instance

    def _remember(self, args: tuple[Any, ...], weights: tuple[Tensor, ...]) -> None:
        for index, decision in self._tracked:
            decisions = _state(args[index]).decisions.setdefault(self._record, [])
            if decision not in decisions:
                decisions.append(decision)
        key = tuple(map(id, weights))
        for weight in weights:
            weakref.finalize(weight, _forget, self._instances, self._guesses, key).atexit = False


def _forget(instances: dict[tuple[int, ...], _Instance], guesses: dict[int, _Instance], key: tuple[int, ...]) -> None:
    instance = instances.pop(key, None)
    if guesses.get(key[0]) is instance:
        guesses.pop(key[0], None)


_LOCK = threading.RLock()  # all that is known of weights is shared between threads
_version = operator.attrgetter("_version")


def _reader(weights: tuple[Tensor, ...]) -> Read:
    inference = [w.is_inference() for w in weights]
    if not any(inference):
        return _versions_and_addresses if _STRIDES_ARE_GUARDED else _versions_addresses_and_strides
    return _addresses if all(inference) and _STRIDES_ARE_GUARDED else _stamps


def _identities(weights: tuple[Tensor, ...]) -> list[Any]:
    return list(map(id, weights))


def _plain(weight: Tensor) -> Tensor:
    """``weight``, or the FP8 tensor in it: what may be referred to weakly."""
    return weight.qdata if isinstance(weight, Fp8Weight) else weight


def _versions_and_addresses(weights: tuple[Tensor, ...]) -> list[Any]:
    return [*map(id, weights), *map(_version, weights), *map(Tensor.data_ptr, weights)]


def _versions_addresses_and_strides(weights: tuple[Tensor, ...]) -> list[Any]:
    return [*_versions_and_addresses(weights), *map(Tensor.stride, weights)]


def _addresses(weights: tuple[Tensor, ...]) -> list[Any]:
    return [*map(id, weights), *map(Tensor.data_ptr, weights)]


def _stamps(weights: tuple[Tensor, ...]) -> list[Any]:
    return [*map(id, weights), *map(_stamp, weights)]


def _getter(indices: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """`operator.itemgetter` that returns a tuple for any number of indices."""
    if not indices:
        return lambda args: ()
    if len(indices) == 1:
        (index,) = indices
        return lambda args: (args[index],)
    return operator.itemgetter(*indices)


_announced_bytes = 0


def _announce_memory() -> None:
    global _announced_bytes
    fp8_bytes = sum(state.nbytes for state in _STATES.values())
    if fp8_bytes <= _announced_bytes:
        return
    _announced_bytes = fp8_bytes
    own_bytes = sum(weight.nbytes for weight, state in _STATES.items() if state.constants)
    logger.warning(
        "FP8 weights take %.1f MB beside the %.1f MB of the weights that they were made from, which remain part of "
        "the model. To need less, convert fewer layers (ignored_layers); see the page on memory in the documentation.",
        fp8_bytes / 1e6,
        own_bytes / 1e6,
    )


def refresh(model: torch.nn.Module) -> list[str]:
    """Compare every FP8 constant of ``model`` with its weight, and make anew those that no longer fit.

    Needed after an edit that leaves no trace: writing through ``weight.data``, through a view of the storage, or in
    place into a parameter that was made in inference mode, which has no version counter. Not needed after
    ``load_state_dict``, an in-place operation on the parameter, PEFT's merging and unmerging, or moving the model.

    Returns:
        The names of the parameters whose constants were made anew, as in ``model.named_parameters()``.

    Raises:
        NonFiniteWeightError: a weight now holds NaN or Inf.
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"a torch.nn.Module belongs here, for example pipeline.transformer, not {type(model).__name__}")
    changed = []
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        for name, weight in model.named_parameters():
            state = state_of(weight)
            if state is None or not state.constants:
                continue
            before = dict(state.constants)
            _bring_up_to_date(
                [
                    (weight, Constant("", made.scheme, transposed, name.removesuffix(".weight"), ()))
                    for (_, transposed), made in before.items()
                ]
            )
            if any(made.fingerprint != before[kind].fingerprint for kind, made in state.constants.items()):
                changed.append(name)
    return changed
