"""The binder: hands a compiled graph the constants of whichever module is running.

One compiled graph serves many modules. Dynamo calls it with the parameters of one; the binder finds the constants that
were made of them (`constants`), and asks at every call whether they still fit.

When a graph gets parameters for the first time, the binder asks which layers they are. If other layers stay by their
names than in the graph's plan, the graph is not for them: they run as the user wrote them this once, and are marked, so
that Dynamo compiles another graph at the next call (`fp8_compile.weights.marks`).

A `QuantizedWeight` holds its constants itself: they are read from it at every call, and there is nothing to make or to
compare. No weak reference to it is kept, because ``torch.utils.swap_tensors``, by which such a parameter is moved to
another device, refuses a tensor that has one. What is known of it hangs on its identity instead, which moves along.
"""

from __future__ import annotations

import functools
import gc
import logging
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..options import Fp8Options
from ..passes.context import DEQUANTIZED, AttentionDecision, Constants, Context, Decision
from ..schemes import Scheme
from ..weights import eligible, marks
from ..weights.layers import Layer, Namer
from ..weights.quantized_weight import QuantizedWeight
from .constants import (
    LOCK,
    STRIDES_ARE_GUARDED,
    GraphRecord,
    announce_memory,
    is_fake,
    make_constants,
    ones_on,
    state_for,
    version_of,
)

logger = logging.getLogger(__name__)

Read = Callable[[tuple[Tensor, ...]], list[Any]]


@dataclass
class _Instance:
    """The constants bound to one module instance.

    Attributes:
        needed: what the constants were made by.
        paths: of the layers whose constants these are, for messages.
        read: reads the cheap signature of changes that is compared at every call.
        seen: what ``read`` returned when the constants were last known to fit; None before that.
    """

    constants: tuple[Tensor, ...]
    needed: Sequence[Constants]
    paths: list[str]
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
        as_written: Callable[..., Any],
        record: GraphRecord,
        context: Context,
        arguments: Sequence[str],
        kept_arguments: Sequence[str],
        namer: Namer,
        check: Callable[[], None],
    ) -> None:
        """
        Args:
            compiled: takes ``kept_arguments``, then the tensors of the context's constants, those first that parameters
                hold, then its ones.
            as_written: the original graph, for parameters that the compiled one is not for.
            arguments: names of the original graph's placeholders, in order.
            kept_arguments: those of them that the rewritten graph still takes, in order.
            check: called when parameters are new to the graph; raises if they shall not run by it.
        """
        place = {name: i for i, name in enumerate(arguments)}
        self._compiled = compiled
        self._as_written = as_written
        self._record = record
        self._constants = tuple(c for c in context.constants if not c.prequantized)
        self._prequantized = _getter([place[c.weight] for c in context.constants if c.prequantized])
        self._ones, self._together = tuple(context.ones), tuple(context.together)
        # Each with its weight's name and place among the arguments.
        self._decided = [(d.weight, place[d.weight], d) for d in record.plan.decisions if d.weight is not None]
        self._attentions = [(place[a.weight], a) for a in record.plan.attentions if a.weight is not None]
        self._options = context.options
        self._namer, self._check = namer, check
        if self._constants:
            self._weights = _getter([place[c.weight] for c in self._constants])
        else:
            weights = _getter(sorted({index for _, index, d in self._decided if d.tracked}))
            self._weights = lambda args: tuple(map(_plain, weights(args)))
        self._kept = _getter([place[name] for name in kept_arguments])
        self._instances: dict[tuple[int, ...], _Instance] = {}
        # By the first weight alone: a fast look-up, whose collisions the comparison with ``seen`` finds.
        self._guesses: dict[int, _Instance] = {}
        self._watched: dict[tuple[int, ...], list[Any]] = {}
        self._swept = False
        _graphs.add(self)

    def __call__(self, *args: Any) -> Any:
        weights = self._weights(args)
        instance = self._guesses.get(id(weights[0])) if weights else None
        try:
            fits = instance is not None and instance.seen == instance.read(weights)
        except RuntimeError:  # ``.data`` has been given an inference tensor, which has no version
            fits = False
        if instance is None or not fits:
            with LOCK:
                instance = self._bind(args, weights)
        if instance is None:
            return self._as_written(*args)
        prequantized = [tensor for weight in self._prequantized(args) for tensor in weight.constants]
        return self._compiled(*self._kept(args), *prequantized, *instance.constants)

    def _bind(self, args: tuple[Any, ...], weights: tuple[Tensor, ...]) -> _Instance | None:
        """The constants of ``weights``; None if the graph is not for these layers."""
        key = tuple(map(id, weights))
        instance = self._instances.get(key)
        fake = any(is_fake(w) for w in weights)
        planned = [d for _, _, d in self._decided]
        attentions = [a for _, a in self._attentions]
        decided = (planned, attentions) if fake or instance is not None else self._decide(args)
        if decided is None:
            return None
        decisions, attentions = decided
        if instance is None:
            of_weight = {d.weight: d for d in decisions if d.scheme is not None}
            paths = [of_weight[c.weight].path for c in self._constants]
            needed = [replace(c, scheme=_scheme(of_weight[c.weight])) for c in self._constants]
            self._check_together(of_weight)
        else:
            paths, needed = instance.paths, list(instance.needed)
        read = _addresses if fake else _reader(weights) if self._constants else _identities
        seen = None if fake else read(weights)
        made = make_constants(weights, needed, paths, verify=instance is None) if needed else []
        flat = tuple(tensor for tensors in made for tensor in tensors)
        flat += tuple(ones_on(device, weights[0]) for device in self._ones)
        # Of adapters nothing is kept, because their owners exchange and resize them.
        adapters = instance is None and any(new.tracked != d.tracked for new, d in zip(decisions, planned, strict=True))
        if fake or not weights or adapters:
            return _Instance(flat, needed, paths, read)
        if not self._swept:
            self._swept = True
            if any(isinstance(arg, QuantizedWeight) for arg in args):
                # What Dynamo needed for compiling refers weakly to the parameters, and is garbage in cycles by now. As
                # long as it is there, such parameters cannot be moved, as group offloading does right after this call.
                gc.collect()
        if instance is None:
            # With nothing seen, the second call comes here again: by then every module has run once, and the sum is
            # known.
            instance = self._instances[key] = _Instance(flat, needed, paths, read)
            self._remember(args, weights, decisions)
            for (index, _), attention in zip(self._attentions, attentions, strict=True):
                known = state_for(args[index]).attentions.setdefault(self._record, [])
                if attention not in known:
                    known.append(attention)
        else:
            if instance.seen is None:
                announce_memory()
            instance.constants, instance.read, instance.seen = flat, read, seen
        self._guesses[key[0]] = instance
        return instance

    def _decide(self, args: tuple[Any, ...]) -> tuple[list[Decision], list[AttentionDecision]] | None:
        """The graph's decisions for the layers that ``args`` are the weights of; None if they differ from its plan."""
        self._check()
        of_args = {name: args[index] for name, index, _ in self._decided}
        layers, roots = self._namer.find(of_args)
        decisions = [_of_layer(d, layers[name], args[index], self._options) for name, index, d in self._decided]
        attentions = [_of_attention(a, layers[str(a.weight)], self._options) for _, a in self._attentions]
        fits = None not in decisions and None not in attentions
        for root in roots:
            marks.mark(root, self._options, anew=not fits)
        if fits:
            found = [d for d in decisions if d is not None]
            eligible.check_calibrated([d.path for d in found if d.needs_scale])
            return found, [a for a in attentions if a is not None]
        for name, weight in of_args.items():
            marks.put(weight, self._options, "", marks.verdict(layers[name], self._options))
            marks.put_of_attentions(weight, self._options, "", layers[name])
        logger.info(
            "%s: run once as written, because the graph that Dynamo chose was made for other layers",
            ", ".join(path for layer in layers.values() for path in layer.paths),
        )
        return None

    def _check_together(self, decisions: Mapping[str | None, Decision]) -> None:
        """Refuse layers that read one quantized activation, and have not the same input scale."""
        for pair in self._together:
            one, other = (decisions[name] for name in pair)
            if _scheme(one).constants_key() != _scheme(other).constants_key():
                scales = " and ".join(f"{_scheme(d).options['input_scale']}" for d in (one, other))
                raise OptionError(
                    f"{one.path} and {other.path} read one activation, which other layers of this kind quantize once "
                    f"for both, and their input scales differ: {scales}. Give both the same, as a calibration does"
                )

    def _remember(self, args: tuple[Any, ...], weights: tuple[Tensor, ...], made: Sequence[Decision]) -> None:
        for (_, index, _), decision in zip(self._decided, made, strict=True):
            if decision.tracked:
                decisions = state_for(args[index]).decisions.setdefault(self._record, [])
                if decision not in decisions:
                    decisions.append(decision)
        key = tuple(map(id, weights))
        # Held by the graph alone, so that it takes them, and the constants, along when it dies before the weights.
        forget = functools.partial(_forget, weakref.ref(self), key)
        self._watched[key] = [weakref.ref(weight, forget) for weight in weights]

    def forget(self) -> None:
        """Bind anew whatever comes next."""
        for known in (self._instances, self._guesses, self._watched):
            known.clear()

    def _drop(self, key: tuple[int, ...]) -> None:
        self._watched.pop(key, None)
        instance = self._instances.pop(key, None)
        if self._guesses.get(key[0]) is instance:
            self._guesses.pop(key[0], None)


_graphs: weakref.WeakSet[BoundGraph] = weakref.WeakSet()


def forget_bindings() -> None:
    """Let all graphs ask again which layers their parameters are, because models remember something else now."""
    with LOCK:
        for graph in list(_graphs):
            graph.forget()


def _scheme(decision: Decision) -> Scheme:
    assert decision.scheme is not None
    return decision.scheme


def _of_layer(decision: Decision, layer: Layer, weight: Tensor, options: Fp8Options) -> Decision | None:
    """``decision``, which was made for another layer, for this one; None if the two differ in what must be done."""
    if decision.verdict is not None and decision.verdict != marks.verdict(layer, options):
        return None
    reason = eligible.kept_by_name(layer, options)
    if reason is None:
        reason = decision.reason
    elif decision.reason.endswith(DEQUANTIZED):
        reason += DEQUANTIZED
    return replace(
        decision,
        scheme=None if decision.scheme is None else eligible.called(weight, layer, options),
        path=layer.path(decision.within) or decision.path,
        reason=reason,
        pattern=eligible.pattern_of(layer, options),
        tracked=not layer.adapter,
    )


def _of_attention(decision: AttentionDecision, linear: Layer, options: Fp8Options) -> AttentionDecision | None:
    """`_of_layer` for an attention, by the layer of the linear that it is named by."""
    layer = linear.attention(decision.above)
    if decision.verdict is not None and decision.verdict != marks.attention_verdict(layer, options):
        return None
    reason = eligible.kept_by_name(layer, options)
    return replace(
        decision,
        path=layer.path(decision.within) or decision.path,
        reason=decision.reason if reason is None else reason,
        pattern=eligible.pattern_of(layer, options),
    )


def _forget(graph: weakref.ref[BoundGraph], key: tuple[int, ...], _: Any) -> None:
    bound = graph()
    if bound is not None:
        bound._drop(key)


_version = operator.attrgetter("_version")


def _reader(weights: tuple[Tensor, ...]) -> Read:
    """What reads the signature of ``weights``, and how many of the storages that they have now have died.

    The allocator may give the address of a storage that died to the next one.
    """
    died: list[Any] = []
    # A storage keeps its Python object, and with it these references, until it dies.
    storages = [weakref.ref(w.untyped_storage(), died.append) for w in weights]
    inference = [w.is_inference() for w in weights]
    version = version_of if any(inference) else _version

    def versions_and_addresses(weights: tuple[Tensor, ...]) -> list[Any]:
        return [*map(id, weights), *map(version, weights), *map(Tensor.data_ptr, weights), len(died)]

    def addresses(weights: tuple[Tensor, ...]) -> list[Any]:
        return [*_addresses(weights), len(died)]

    def strides(weights: tuple[Tensor, ...]) -> list[Any]:
        return [*versions_and_addresses(weights), *map(Tensor.stride, weights)]

    read = strides if not STRIDES_ARE_GUARDED else addresses if all(inference) else versions_and_addresses
    read.storages = storages  # type: ignore[attr-defined]
    return read


def _identities(weights: tuple[Tensor, ...]) -> list[Any]:
    return list(map(id, weights))


def _plain(weight: Tensor) -> Tensor:
    """``weight``, or the values in it: what may be referred to weakly."""
    return weight.constants[0] if isinstance(weight, QuantizedWeight) else weight


def _addresses(weights: tuple[Tensor, ...]) -> list[Any]:
    return [*map(id, weights), *map(Tensor.data_ptr, weights)]


def _getter(indices: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """`operator.itemgetter` that returns a tuple for any number of indices."""
    if not indices:
        return lambda args: ()
    if len(indices) == 1:
        (index,) = indices
        return lambda args: (args[index],)
    return operator.itemgetter(*indices)
