"""What a calibration knows of a model and its layers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..numerics import FP8_MAX, SCALE_FLOOR
from ..weights.layers import Tree

Features = tuple[int, int]
"""The shape of a weight: output features, input features."""

NEVER_RAN = "it never ran while the model was calibrated"

ALWAYS_ZERO = "its input was always zero, which says nothing of the next"


@dataclass(frozen=True)
class Step:
    """One call of a model.

    Attributes:
        generation: which pass through the timesteps it belongs to, from 0.
        index: of the call in that, from 0; with guidance in calls of its own, a timestep has several.
        timestep: the model's own argument, or None if it has none.
    """

    generation: int
    index: int
    timestep: float | None


@dataclass(frozen=True)
class Inputs:
    """Sizes at which a model ran.

    Attributes:
        shapes: of the tensors among the arguments of one call, by the argument's name.
        calls: how many had these.
    """

    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    calls: int


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """What a linear was fed.

    Attributes:
        paths: of all linears that have this weight, as `fp8_compile.patterns.layer_path` gives them.
        amax: the largest finite ``|x|``, exact.
        values: how many there were, NaN and Inf among them.
        nonfinite: how many were NaN or Inf.
        calls: how often it ran.
        rows: the fewest and the most rows (tokens) of a call.
        ranges: the largest finite ``|x|`` in each step of the model; None where it did not run.
        counts: ``[FINITE_BINS]`` int64: the histogram of the finite ``|x|`` (`fp8_compile.calibration.histogram`).
    """

    paths: tuple[str, ...]
    amax: float
    values: int
    nonfinite: int
    calls: int
    rows: tuple[int, int]
    ranges: tuple[float | None, ...]
    counts: Tensor

    @property
    def problem(self) -> str | None:
        """Why this record gives no scale, or None."""
        if self.nonfinite:
            return f"{self.nonfinite:,} of the {self.values:,} values of its input were NaN or Inf"
        return ALWAYS_ZERO if self.amax / FP8_MAX < SCALE_FLOOR else None


@dataclass(frozen=True, eq=False)
class ModelRecord:
    """What was seen of one model.

    Attributes:
        name: what it was called when it was calibrated.
        class_name: of the model.
        linears: the shapes of the weights of its ``nn.Linear``s, by path, without adapters.
        others: the same of its other matrices, which may be those of linears too, or embeddings.
        inputs: the sizes at which it ran.
        steps: its calls, in their order.
        layers: by the first of their paths.
    """

    name: str
    class_name: str
    linears: Mapping[str, Features]
    others: Mapping[str, Features]
    inputs: tuple[Inputs, ...]
    steps: tuple[Step, ...]
    layers: Mapping[str, LayerRecord]

    @property
    def digest(self) -> str:
        """Of its layers: their paths and shapes."""
        return digest_of(self.class_name, self.linears, self.others)

    @property
    def generations(self) -> int:
        """How many passes through the timesteps were seen."""
        return 1 + max((step.generation for step in self.steps), default=-1)

    @property
    def unseen(self) -> tuple[str, ...]:
        """The linears that never ran."""
        seen = {path for layer in self.layers.values() for path in layer.paths}
        return tuple(path for path in self.linears if path not in seen)

    @property
    def problems(self) -> dict[str, str]:
        """By path, why a layer gets no scale."""
        found = {path: NEVER_RAN for path in self.unseen}
        for layer in self.layers.values():
            if layer.problem is not None:
                found |= dict.fromkeys(layer.paths, layer.problem)
        return found

    def difference(self, class_name: str, linears: Mapping[str, Features], others: Mapping[str, Features]) -> str:
        """What tells the model apart from one of these layers; "" if nothing does."""
        if self.class_name != class_name:
            return f"it is of a {self.class_name}, and this model is a {class_name}"
        for mine, given in ((self.linears, linears), (self.others, others)):
            shapes = [p for p in mine if p in given and mine[p] != given[p]]
            if shapes:
                path = shapes[0]
                return (
                    f"the weight of {path} has the shape {given[path]} in this model, and had {mine[path]}"
                    f"{_more(len(shapes))}"
                )
            for some, rest, words in (
                (mine, given, "this model has no"),
                (given, mine, "the calibrated model had no"),
            ):
                missing = [path for path in some if path not in rest]
                if missing:
                    return f"{words} {missing[0]}{_more(len(missing))}"
        return ""


def _more(count: int) -> str:
    return f" ({count - 1} more differ)" if count > 1 else ""


def digest_of(class_name: str, linears: Mapping[str, Features], others: Mapping[str, Features]) -> str:
    """16 hexadecimal digits of the SHA-256 of a model's class, and the paths and shapes of its layers."""
    text = repr((class_name, sorted(linears.items()), sorted(others.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without what ``torch.compile`` put around it."""
    while model._modules.keys() == {"_orig_mod"}:
        model = model.get_submodule("_orig_mod")
    return model


def matrices_of(model: nn.Module) -> tuple[dict[str, Features], dict[str, Features]]:
    """The shapes of the weights of ``model``'s ``nn.Linear``s, by path, and of its other matrices; without adapters."""
    tree = Tree(model)
    linears: dict[str, Features] = {}
    others: dict[str, Features] = {}
    for module, leaf in tree.matrices():
        layer = tree.layer(module, leaf)
        if not layer.adapter:
            rows, columns = module._parameters[leaf].shape  # type: ignore[union-attr]
            found = linears if isinstance(module, nn.Linear) and leaf == "weight" else others
            found |= dict.fromkeys(layer.paths, (rows, columns))
    return dict(sorted(linears.items())), dict(sorted(others.items()))


def generations_of(timesteps: Sequence[float | None]) -> list[Step]:
    """The steps of calls with these timesteps.

    Within a generation they all go one way, down in most models and up in others. One that turns back begins the next
    generation. Calls with the same timestep belong together, so generations of a single step cannot be told apart.
    """
    steps: list[Step] = []
    generation, index, direction, before = 0, 0, 0.0, None
    for timestep in timesteps:
        if timestep is not None and before is not None and timestep != before:
            way = 1.0 if timestep > before else -1.0
            if direction and way != direction:
                generation, index, direction = generation + 1, 0, 0.0
            else:
                direction = way
        steps.append(Step(generation, index, timestep))
        index, before = index + 1, timestep if timestep is not None else before
    return steps
