"""Watch a model run, and record what its linears are fed."""

from __future__ import annotations

import functools
import inspect
import math
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CalibrationError, UncalibratedLayersWarning
from ..weights.layers import Layer, all_parameters, is_matrix, running_modules, tree_of
from ..weights.quantized_weight import QuantizedWeight
from .histogram import FINITE_BINS, count
from .records import Inputs, LayerRecord, ModelRecord, generations_of, matrices_of, unwrapped
from .result import Calibration, environment

aten = torch.ops.aten
_T: Any = torch.Tensor

_LINEAR = (torch.nn.functional.linear, aten.linear, aten.linear.default)
_ADDMM = (torch.addmm, _T.addmm, _T.addmm_, aten.addmm, aten.addmm.default)
_MM = (torch.mm, _T.mm, aten.mm, aten.mm.default)
_MATMUL = (torch.matmul, _T.matmul, _T.__matmul__, aten.matmul, aten.matmul.default)

# By function: where the input and the weight are among its arguments, and what they are called.
_WAYS: dict[Any, tuple[tuple[int, tuple[str, ...]], tuple[int, tuple[str, ...]]]] = {
    **dict.fromkeys(_LINEAR, ((0, ("input",)), (1, ("weight",)))),
    **dict.fromkeys(_ADDMM, ((1, ("mat1",)), (2, ("mat2",)))),
    **dict.fromkeys(_MM + _MATMUL, ((0, ("input", "self")), (1, ("mat2", "other", "tensor2")))),
}

# What gives a matrix with the same values: of these, the result is the weight still.
_RELAYOUTS = frozenset(
    [
        *(_T.T.__get__, _T.mT.__get__, _T.H.__get__, _T.mH.__get__, _T.data.__get__),
        *(_T.t, _T.transpose, _T.permute, _T.swapaxes, _T.swapdims, _T.adjoint, _T.movedim),
        *(torch.t, torch.transpose, torch.permute, torch.swapaxes, torch.swapdims, torch.adjoint, torch.movedim),
        *(_T.to, _T.type_as, _T.contiguous, _T.detach, _T.clone, _T.float, _T.half, _T.bfloat16, _T.cpu, _T.cuda),
        *(torch.detach, torch.clone),
        *(aten.t, aten.t.default, aten.transpose, aten.transpose.int, aten.permute, aten.permute.default),
        *(aten.numpy_T, aten.numpy_T.default, aten.mT, aten.mT.default, aten.detach, aten.detach.default),
        *(aten.clone, aten.clone.default, aten.alias, aten.alias.default),
        *(aten.to, aten.to.dtype, aten.to.device, aten._to_copy, aten._to_copy.default),
    ]
)

_TIMESTEPS = ("timestep", "timesteps", "t", "time_step")


@contextmanager
def calibrate(*models: nn.Module, progress: bool = True, **named: nn.Module) -> Iterator[Calibration]:
    """Record what the linears of ``models`` are fed while they run::

        with fp8_compile.calibrate(pipe.transformer) as calibration:
            pipe("a red circle")
            pipe("a blue square")
        calibration.save("scales.json")

    Within the block models run in eager mode, compiled or not, because only that can be watched
    (``torch.compiler.set_stance("force_eager")``, for the whole process); compiled code is used again afterwards, as it
    was. Linears are found by their weights: ``F.linear``, ``mm``, ``matmul``, ``addmm`` and ``@`` on a parameter of the
    model or its transpose, also a quantized one; of adapters, the layer below. Nothing waits for the device.

    Args:
        models: the modules to record, such as ``pipe.transformer``; called "model", "model_2", ... in this order.
        progress: a bar that counts calls of the models, if tqdm is there.
        named: the same under names of your own: ``calibrate(high=pipe.transformer, low=pipe.transformer_2)``.

    Yields:
        The calibration, which is filled when the block is left, by an exception too.

    Raises:
        TypeError: one of ``models`` is no module.
        CalibrationError: no model is given, or one twice; no linear ran in the block; a model is called from another
            thread than this one, where its linears cannot be seen; an input has no values (meta); a model has got
            other layers in the block, as by fusing projections.

    Warns:
        UncalibratedLayersWarning: some linears never ran. It names them.
    """
    given = {f"model_{number}" if number > 1 else "model": model for number, model in enumerate(models, start=1)}
    repeated = given.keys() & named.keys()
    if repeated:
        raise CalibrationError(f"two models are called {repeated.pop()!r}")
    for name, model in {**given, **named}.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: expected a torch.nn.Module, such as pipe.transformer, got {type(model).__name__}")
    recordings = [_Recording(name, unwrapped(model)) for name, model in {**given, **named}.items()]
    if len({id(recording.root) for recording in recordings}) < max(1, len(recordings)):
        raise CalibrationError("a model is given twice" if recordings else "expected a model, such as pipe.transformer")
    calibration = Calibration({}, environment())
    watch = _Watch(recordings, _bar(progress))
    before = {recording.name: matrices_of(recording.root) for recording in recordings}
    try:
        with watch.watching():
            yield calibration
    finally:
        calibration.models |= {recording.name: recording.finished() for recording in recordings}
        calibration.remember({recording.name: recording.root for recording in recordings})
    if not any(record.layers for record in calibration.models.values()):
        classes = ", ".join(record.class_name for record in calibration.models.values())
        raise CalibrationError(
            f"no linear of {classes} ran in this block. Is it the model that the pipeline calls, and is it called here?"
        )
    for record in list(calibration.models.values()):
        linears, others = before[record.name]
        earlier = replace(record, linears=linears, others=others)
        changed = earlier.difference(record.class_name, record.linears, record.others)
        if changed:
            calibration.models.clear()
            raise CalibrationError(
                f"the layers of {record.name!r} changed while it was calibrated ({changed}): calibrate it as you use it"
            )
        if record.unseen:
            warnings.warn(_unseen(record), UncalibratedLayersWarning, stacklevel=3)


def _unseen(record: ModelRecord) -> str:
    count, shown = len(record.unseen), record.unseen[:20]
    return (
        f"calibrate: {count} of the {len(record.linears)} linears of {record.name!r} ({record.class_name}) never ran, "
        f"and have no static scale: {', '.join(shown)}{f' and {count - len(shown)} more' if count > len(shown) else ''}"
    )


class _Layer:
    """What has been seen of a layer, on its device."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.paths = paths
        self.values = 0
        self.calls = 0
        self.rows: list[int] = []
        self.counts: Tensor | None = None
        self.amax: Tensor | None = None
        self.amax_of_step: Tensor | None = None

    def see(self, x: Tensor) -> None:
        with torch.no_grad(), torch.inference_mode(False):  # what is made in that mode can be written in no other
            counts, amax = count(x)
            self.counts = counts if self.counts is None else self.counts.to(x.device).add_(counts)
            self.amax = _larger(self.amax, amax)
            self.amax_of_step = _larger(self.amax_of_step, amax)
        rows = x.shape[:-1].numel()
        self.rows = [min([*self.rows, rows]), max([*self.rows, rows])] if self.rows else [rows, rows]
        self.values += x.numel()
        self.calls += 1

    def record(self, ranges: list[float | None]) -> LayerRecord:
        assert self.counts is not None
        counts = self.counts.cpu()
        nonfinite = int(counts[FINITE_BINS:].sum())
        amax = _floats([self.amax])[0]
        rows = (self.rows[0], self.rows[1])
        return LayerRecord(
            self.paths, amax, self.values, nonfinite, self.calls, rows, tuple(ranges), counts[:FINITE_BINS].clone()
        )


def _larger(before: Tensor | None, bits: Tensor) -> Tensor:
    return bits if before is None else torch.maximum(before.to(bits.device), bits)


def _floats(bits: list[Tensor | None]) -> list[float]:
    """The float32 values of these bits, in one transfer from each device."""
    found: dict[int, float] = {}
    devices: dict[torch.device, dict[int, Tensor]] = {}
    for place, tensor in enumerate(bits):
        if tensor is not None:
            devices.setdefault(tensor.device, {})[place] = tensor
    for tensors in devices.values():
        values = torch.stack(list(tensors.values())).cpu().view(torch.float32).tolist()
        found |= dict(zip(tensors, values, strict=True))
    return [found[place] for place in range(len(bits))]


class _Recording:
    """One model that is watched."""

    def __init__(self, name: str, root: nn.Module) -> None:
        self.name = name
        self.root = root
        self.depth = 0
        self.layers: dict[str, _Layer] = {}
        self._inputs: Counter[tuple[tuple[str, tuple[tuple[int, ...], ...]], ...]] = Counter()
        self._timesteps: list[Tensor | float | None] = []
        self._ranges: list[dict[str, Tensor]] = []
        # Of the class: offloading puts functions of its own in place of a module's forward. TorchScript's is none.
        forward = inspect.getattr_static(type(root), "forward")
        self._arguments = list(inspect.signature(forward).parameters)[1:] if inspect.isfunction(forward) else []

    def see(self, layer: Layer, x: Tensor) -> None:
        path = layer.paths[0]
        if path not in self.layers:
            self.layers[path] = _Layer(layer.paths)
        self.layers[path].see(x)

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """An outermost call begins."""
        given = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        shapes = {name: tuple(tuple(t.shape) for t in _tensors(value)) for name, value in sorted(given.items())}
        self._inputs[tuple((name, found) for name, found in shapes.items() if found)] += 1
        timestep = next((given[name] for name in _TIMESTEPS if given.get(name) is not None), None)
        if isinstance(timestep, Tensor) and timestep.numel():
            timestep = timestep.detach().float().max()
        self._timesteps.append(timestep if isinstance(timestep, Tensor | float | int) else None)
        for layer in self.layers.values():
            layer.amax_of_step = None

    def end(self) -> None:
        """An outermost call has ended."""
        self._ranges.append(
            {path: layer.amax_of_step for path, layer in self.layers.items() if layer.amax_of_step is not None}
        )

    def finished(self) -> ModelRecord:
        """What was seen of the model."""
        if self.depth:  # an interrupt, after which torch calls no hooks
            self.end()
        steps = [list(zip(amaxes, _floats(list(amaxes.values())), strict=True)) for amaxes in self._ranges]
        ranges: dict[str, list[float | None]] = {path: [None] * len(steps) for path in self.layers}
        for index, step in enumerate(steps):
            for path, amax in step:
                ranges[path][index] = amax
        return ModelRecord(
            self.name,
            type(self.root).__name__,
            *matrices_of(self.root),
            tuple(Inputs(dict(shapes), calls) for shapes, calls in self._inputs.items()),
            tuple(generations_of([_finite(t) for t in self._timesteps])),
            {path: layer.record(ranges[path]) for path, layer in self.layers.items()},
        )


def _finite(timestep: Tensor | float | None) -> float | None:
    value = math.nan if timestep is None else float(timestep)
    return value if math.isfinite(value) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


class _Watch(TorchFunctionMode):
    """Sees every call of a torch function, and gives the inputs of linears to the recordings of their models."""

    def __init__(self, recordings: list[_Recording], bar: Any) -> None:
        super().__init__()
        self._recordings = recordings
        self._bar = bar
        self._thread = threading.get_ident()
        self._owners: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        # What was made of a weight by transposing or casting it.
        self._origins: Any = WeakIdKeyDictionary()
        # Modules that are in none of the models, until the next step.
        self._foreign: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
        self._layers: dict[tuple[int, int, str], Layer | None] = {}
        self._trees: dict[int, Any] = {}
        self._look()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the block is left, and leave everything as it was."""
        with ExitStack() as stack:
            stack.callback(self._bar.close)
            for recording in self._recordings:
                before, after = functools.partial(self._before, recording), functools.partial(self._after, recording)
                hook = recording.root.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(recording.root.register_forward_hook(after, always_call=True).remove)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self)
            yield

    def _before(self, recording: _Recording, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            raise CalibrationError(
                f"{recording.name!r} is called from another thread than the one that entered calibrate, where its "
                "linears cannot be seen: enter calibrate in the thread that runs the pipeline"
            )
        recording.depth += 1
        if recording.depth == 1:
            self._foreign.clear()
            recording.begin(args, kwargs)

    def _after(self, recording: _Recording, *_: Any) -> None:
        if threading.get_ident() != self._thread:  # `_before` has raised
            return
        if recording.depth == 1:
            recording.end()
            self._bar.update(1)
            self._bar.set_postfix(layers=sum(len(each.layers) for each in self._recordings), refresh=False)
        recording.depth -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WAYS:
            x, weight = (_operand(args, kwargs, *place) for place in _WAYS[func])
            if isinstance(x, Tensor) and isinstance(weight, Tensor):
                self._see(x, weight)
        result = func(*args, **kwargs)
        if func in _RELAYOUTS and isinstance(result, Tensor) and args and result is not args[0]:
            weight = self._origins.get(args[0], args[0])
            same = result.dim() == weight.dim() == 2 and result.numel() == weight.numel()
            # No other class: a module that is moved swaps its quantized weights for the moved ones, which torch refuses
            # to do with what is referred to weakly.
            if same and type(result) is Tensor and (weight is not args[0] or isinstance(weight, nn.Parameter)):
                self._origins[result] = weight
        return result

    def _see(self, x: Tensor, weight: Tensor) -> None:
        if weight.dim() != 2 or x.dim() == 0 or not x.is_floating_point():
            return
        found = self._find(self._origins.get(weight, weight))
        if found is None:
            return
        layers = [(r, layer) for r in self._recordings if (layer := self._layer(r, *found)) is not None]
        running = [(recording, layer) for recording, layer in layers if recording.depth]
        for recording, layer in running or layers:
            if x.is_meta:
                raise CalibrationError(f"the input of {layer.paths[0]} is on the meta device: it has no values")
            recording.see(layer, x)

    def _layer(self, recording: _Recording, module: nn.Module, leaf: str) -> Layer | None:
        """The layer in this model whose weight is ``leaf`` of ``module``; None if it has none, or it is an adapter."""
        tree = tree_of(recording.root)
        if not tree.holds(module):
            foreign = self._foreign.setdefault(module, set())
            if id(recording) in foreign:
                return None
            tree = tree_of(recording.root, module)
            if not tree.holds(module):
                foreign.add(id(recording))
                return None
        if self._trees.get(id(recording)) is not tree:  # modules have moved
            self._trees[id(recording)] = tree
            self._layers = {key: layer for key, layer in self._layers.items() if key[0] != id(recording)}
        key = id(recording), id(module), leaf
        if key not in self._layers:
            layer = tree.layer(module, leaf)
            self._layers[key] = None if layer.adapter else layer
        return self._layers[key]

    def _find(self, weight: Tensor) -> tuple[nn.Module, str] | None:
        """The module that holds ``weight``, and under which name; None if it is of none of the models."""
        base = weight._base
        if isinstance(base, nn.Parameter) and base.dim() == 2 and base.numel() == weight.numel():  # a view of it all
            weight = base
        known = self._known(weight)
        if known is not None:
            return known
        # Offloading may put new parameters into modules at each call. The one that is running is mostly the one.
        for module in running_modules():
            leaf = _leaf(module, weight)
            if leaf is not None:
                self._owners[id(weight)] = weakref.ref(module), leaf
                return module, leaf
        if not isinstance(weight, nn.Parameter | QuantizedWeight):
            return None
        self._look()
        return self._known(weight) or self._by_memory(weight)

    def _known(self, weight: Tensor) -> tuple[nn.Module, str] | None:
        ref, leaf = self._owners.get(id(weight), (None, ""))
        module = None if ref is None else ref()
        # Another tensor may have got the number of one that is gone.
        return (module, leaf) if module is not None and _leaf(module, weight) == leaf else None

    def _look(self) -> None:
        """Learn where all parameters of the models are now."""
        self._owners = {
            id(parameter): (weakref.ref(module), leaf)
            for recording in self._recordings
            for _, module, leaf, parameter in all_parameters(recording.root)
        }

    def _by_memory(self, weight: Tensor) -> tuple[nn.Module, str] | None:
        """The parameter that another one, ``weight``, was made of."""
        memory = _memory(weight)
        for recording in self._recordings if memory else ():
            for _, module, leaf, parameter in all_parameters(recording.root):
                if is_matrix(parameter) and parameter.numel() == weight.numel() and _memory(parameter) == memory:
                    return module, leaf
        return None


def _memory(weight: Tensor) -> object:
    """What tells whether two tensors hold the same values; None if nothing does."""
    if isinstance(weight, QuantizedWeight):
        return weight.identity
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta or not weight.numel():
        return None
    return weight.device, weight.data_ptr()


def _leaf(module: nn.Module, weight: Tensor) -> str | None:
    return next((leaf for leaf, parameter in module._parameters.items() if parameter is weight), None)


def _operand(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int, names: tuple[str, ...]) -> Any:
    return args[index] if len(args) > index else next((kwargs[name] for name in names if name in kwargs), None)


class _NoBar:
    """In place of a progress bar."""

    def update(self, _: int) -> None: ...

    def set_postfix(self, **_: Any) -> None: ...

    def close(self) -> None: ...


def _bar(progress: bool) -> Any:
    """A bar that counts steps, if one is wanted and tqdm is there (diffusers brings it)."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return _NoBar()
    return tqdm(desc="Calibrating", unit="step", leave=False, disable=not progress)
