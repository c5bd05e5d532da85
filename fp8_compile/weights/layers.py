"""Which layer a parameter is the weight of.

Asked when a graph is compiled and each time it gets parameters that it has not had before, because a graph does not
know: Dynamo compiles one for a block and runs it with all of them, and where a frame breaks, one for a single linear.
The Python stack knows: the outermost module that is running, and owns the parameter, gives it the same path however the
graph was cut.

What a model was asked when it was quantized is kept in it (`records`), by path as well, so that a parameter that is
wrapped anew, copied or replaced is still the layer that it was.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import CodeType, FrameType

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..patterns import is_adapter, join, layer_path, parameter_layer, spellings
from ..recipes import EncoderRecipe, Recipe, block_classes, recipe_of
from .quantized_weight import QuantizedWeight
from .records import Record, kept_by_itself, record_of
from .sharded import refilled, stack

SDPA = "sdpa"
"""What the path of an attention ends with, so that it can be named without its linears: ``blocks.3.attn.sdpa``."""

NO_RECORD = "the model holds quantized weights, and no record of what was to be kept"


@dataclass(frozen=True)
class Layer:
    """The linears that one parameter is the weight of; or what multiplies by the stack of matrices that it is.

    Attributes:
        paths: of these linears in the outermost module that is running, as `layer_path` gives them.
        regional: the same paths within the modules that were compiled, where those are parts of the outermost.
        adapter: it belongs to a low-rank adapter.
        recorded: why it stays because of what the modules around it are: an earlier conversion of the model left it as
            it was, or FSDP refills it; None if nothing speaks against it.
        keeps: what the recipe of the model that it is in keeps (`fp8_compile.recipes`).
        outside: that model has no recipe, and it is in none of its repeated blocks.
    """

    paths: tuple[str, ...] = ()
    regional: tuple[str, ...] = ()
    adapter: bool = False
    recorded: str | None = None
    keeps: tuple[str, ...] = ()
    outside: bool = False

    def path(self, within: str) -> str | None:
        """The one of ``paths`` that ends as ``within``, a path in a part, does; else the first."""
        same = (path for path in self.paths if path == within or path.endswith(f".{within}"))
        return next(same, next(iter(self.paths), None))

    def attention(self, above: int) -> Layer:
        """The attention in the module that is ``above`` segments above this layer."""

        def paths(given: tuple[str, ...]) -> tuple[str, ...]:
            segments = (path.split(".") for path in given)
            return tuple(dict.fromkeys(".".join((*s[:-above], SDPA)) for s in segments if len(s) >= above))

        return Layer(paths(self.paths), paths(self.regional), keeps=self.keeps, outside=self.outside)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """All that a pattern may match."""
        return tuple(dict.fromkeys(s for path in (*self.paths, *self.regional) for s in spellings(path)))


# --- where things are ---


@dataclass(frozen=True)
class _Place:
    """Where a module is in a tree.

    Attributes:
        raw: its path as `named_modules` gives it.
        path: the same without what wraps the root.
        regional: its path within the compiled module around it.
        record: of the innermost module around it that has one.
        recorded: its path within that one.
        recipe: of the innermost module around it that has one.
        blocks: the classes of the repeated blocks of the innermost module around it that has some, and no recipe; none
            within such a block.
    """

    raw: str
    path: str
    regional: str
    record: Record | None
    recorded: str
    recipe: Recipe | EncoderRecipe | None
    blocks: tuple[str, ...]


class Tree:
    """All modules below a root.

    Attributes:
        marked: for which options its modules bear marks (`fp8_compile.weights.marks`).
        count: of the root's linears that are no adapters, and its stacks of experts.
        names: all that a pattern may match: their paths.
        others: the same of its other matrices, which a graph may find to be those of linears.
        attentions: the same of the attentions that its linears may feed.
        has_recipe: whether there is a recipe for one of the modules, or repeated blocks.
    """

    def __init__(self, root: nn.Module) -> None:
        self._places: weakref.WeakKeyDictionary[nn.Module, list[_Place]] = weakref.WeakKeyDictionary()
        owners: dict[int, dict[tuple[int, str], tuple[weakref.ref[nn.Module], str]]] = {}
        self._root = weakref.ref(root)
        self.marked: set[str] = set()
        self.count = 0
        unrecorded, linears, experts, others = False, [], [], []
        places: dict[str, _Place] = {}
        for raw, around in walk(root):
            module = around[-1]
            place = places[raw] = self._place(raw, around, places)
            self._places.setdefault(module, []).append(place)
            linear = isinstance(module, nn.Linear)
            if linear and not is_adapter(raw):
                self.count += len(self._places[module]) == 1
                linears += [place.path, place.regional]
            stacked = [] if is_adapter(raw) else [leaf for leaf, _ in stacks(module)]
            self.count += len(stacked) * (len(self._places[module]) == 1)
            for leaf, weight in module._parameters.items():
                if is_matrix(weight):
                    if leaf in stacked:
                        experts += [parameter_layer(place.path, leaf), parameter_layer(place.regional, leaf)]
                    elif not (linear or is_adapter(raw)):
                        others += [parameter_layer(place.path, leaf), parameter_layer(place.regional, leaf)]
                    owners.setdefault(id(weight), {})[id(module), leaf] = weakref.ref(module), leaf
                    unrecorded |= isinstance(weight, QuantizedWeight) and place.record is None
        # By the module that has one of the names, because parameters may be replaced. Weakly, because these modules may
        # be the root, or know it.
        self._ties = {key: list(all_of.values()) for all_of in owners.values() if len(all_of) > 1 for key in all_of}
        self._unrecorded = unrecorded
        self.has_recipe = any(place.recipe is not None or place.blocks for place in places.values())
        self.names, self.others = _all_names([*linears, *experts]), _all_names(others)
        parents = (name.rpartition(".")[0] for name in _all_names(linears))
        self.attentions = tuple(dict.fromkeys(join(parent, SDPA) for parent in parents))

    @staticmethod
    def _place(raw: str, around: tuple[nn.Module, ...], places: Mapping[str, _Place]) -> _Place:
        module, record, recipe = around[-1], record_of(around[-1]), recipe_of(around[-1])
        if len(around) == 1:
            return _Place("", "", "", record, "", recipe, block_classes(module))
        parent_raw, _, name = raw.rpartition(".")
        parent, holder = places[parent_raw], around[-2]
        alone = len(around) > 3 and isinstance(around[-3], nn.ModuleList) and len(around[-3]) == 1
        if (
            alone
            and isinstance(module, nn.ModuleList)
            and any(part is m for part in holder._modules.values() for m in around[:-2])
        ):
            # cache-dit puts a list of one module that knows the whole model in place of a list of blocks, and that list
            # into it.
            return replace(places[parent_raw.rpartition(".")[0]], raw=raw)
        # DataParallel and its like hold the model as their only part.
        wrapper = name == "module" and not parent.path and len(holder._modules) == 1
        compiled = name == "_orig_mod" or module._compiled_call_impl is not None
        inner = recipe is not None or type(module).__name__ in parent.blocks
        return _Place(
            raw,
            parent.path if wrapper else join(parent.path, name),
            "" if wrapper or compiled else join(parent.regional, name),
            parent.record if record is None else record,
            join(parent.recorded, name) if record is None else "",
            parent.recipe if recipe is None else recipe,
            () if inner else block_classes(module) or parent.blocks,
        )

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is where it was when this tree was made."""
        return module in self._places and all(self._around(place)[-1] is module for place in self._places[module])

    def _around(self, place: _Place) -> list[nn.Module | None]:
        """The root, and the modules on the way to ``place``."""
        modules = [self._root()]
        for name in place.raw.split(".") if place.raw else ():
            # No ``get``, which those of a ScriptModule do not have.
            known = modules[-1] is not None and name in modules[-1]._modules
            modules.append(modules[-1]._modules[name] if known else None)  # type: ignore[union-attr]
        return modules

    def matrices(self) -> Iterator[tuple[nn.Module, str]]:
        """What may be a linear's weight: each module, and the parameter's name in it."""
        for module in list(self._places):
            yield from ((module, leaf) for leaf, weight in module._parameters.items() if is_matrix(weight))

    def layer(self, module: nn.Module, leaf: str) -> Layer:
        """The layer whose weight is the parameter ``leaf`` of ``module``, a module of this tree."""
        quantized = isinstance(module._parameters[leaf], QuantizedWeight)
        paths, regional, adapter, recorded = [], [], False, None
        keeps: dict[str, None] = {}
        outside = []
        for ref, name in self._ties.get((id(module), leaf), [(weakref.ref(module), leaf)]):
            owner = ref()
            if owner is None:
                continue
            for place in self._places[owner]:
                adapter = adapter or is_adapter(place.raw)
                outside.append(bool(place.blocks))
                keeps |= dict.fromkeys(() if place.recipe is None else place.recipe.keep)
                paths.append(layer_path(parameter_layer(place.path, name)))
                regional.append(layer_path(parameter_layer(place.regional, name)))
                recorded = recorded or refilled(module for module in self._around(place) if module is not None)
                if place.record is not None and recorded is None:
                    recorded = place.record.reason(owner, name, layer_path(parameter_layer(place.recorded, name)))
        recorded = recorded or kept_by_itself(module, leaf)
        if recorded is None and self._unrecorded and self._places[module][0].record is None:
            recorded = NO_RECORD
        distinct = tuple(dict.fromkeys(paths))
        others = tuple(path for path in dict.fromkeys(regional) if path and path not in distinct)
        return Layer(distinct, others, adapter, None if quantized else recorded, tuple(keeps), any(outside))


def _all_names(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s for path in paths for s in spellings(layer_path(path))))


def walk(root: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """All modules below ``root`` by all their paths, each behind those that are around it.

    As ``named_modules(remove_duplicate=False)``, but for modules that hold what they are in.
    """

    def below(path: str, around: tuple[nn.Module, ...]) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
        yield path, around
        for name, part in around[-1]._modules.items():
            if part is not None and not any(part is module for module in around):
                yield from below(join(path, name), (*around, part))

    return below("", (root,))


def all_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """All parameters below ``root`` by all their names: the path of the module that holds it, that, its name there."""
    for path, around in walk(root):
        for leaf, parameter in around[-1]._parameters.items():
            if parameter is not None:
                yield path, around[-1], leaf, parameter


def is_matrix(weight: nn.Parameter | None) -> bool:
    """Whether ``weight`` may be that of a linear, or a stack of the matrices of experts."""
    return weight is not None and not is_lazy(weight) and (weight.dim() == 2 or _is_stack(weight))


def stacks(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of ``module`` that may be stacks of the matrices of experts, ``[E, K, N]``, by name."""
    for leaf, parameter in module._parameters.items():
        if (
            parameter is not None
            and not isinstance(module, _ConvNd)
            and not is_lazy(parameter)
            and _is_stack(parameter)
        ):
            yield leaf, parameter


def _is_stack(weight: Tensor) -> bool:
    """A stack of one is a table of positions or queries."""
    return weight.dim() == 3 and len(weight) > 1 and weight.is_floating_point()


_trees: weakref.WeakKeyDictionary[nn.Module, Tree] = weakref.WeakKeyDictionary()


def tree_of(root: nn.Module, module: nn.Module | None = None) -> Tree:
    """The tree of ``root``, as it was when last asked for; made anew if ``module`` is in ``root`` and not in that."""
    tree = _trees.get(root)
    if tree is None or (
        module is not None and not tree.holds(module) and any(part is module for part in root.modules())
    ):
        tree = _trees[root] = Tree(root)
    return tree


def forget_trees() -> None:
    """Look at all modules anew, because they remember something else now."""
    _trees.clear()


# --- who is running ---


_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)


def _is_call(code: CodeType) -> bool:
    """Whether ``code`` is how torch calls modules. What Dynamo writes may hold a dict as a constant: it has no hash."""
    return any(code is call for call in _CALLS)


def running_modules() -> list[nn.Module]:
    """The modules whose methods are being executed, the innermost first."""
    found: dict[int, nn.Module] = {}
    for frame in stack():
        if _may_be_a_module(frame):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                found[id(module)] = module
    return list(found.values())


def _may_be_a_module(frame: FrameType) -> bool:
    """Whether ``frame`` must be asked for its ``self``.

    As few as possible are: before Python 3.13, who reads a frame's variables keeps all of them alive, activations of a
    pipeline among them, until the frame returns.
    """
    code, caller = frame.f_code, frame.f_back
    if _is_call(code):
        return True
    if "self" not in code.co_varnames and "self" not in code.co_cellvars:
        return False
    if caller is not None and _is_call(caller.f_code):  # which has the same self, and no more than the arguments
        return False
    owner = frame.f_globals.get(code.co_qualname.partition(".")[0])
    return not isinstance(owner, type) or issubclass(owner, nn.Module)


def _local() -> Iterator[nn.Module]:
    """Modules in the variables of the functions that are being executed, the outermost first.

    The function that is compiled is on the stack when its graph is called, and is not while it is compiled. Were its
    variables the first, a layer would have two names.
    """
    for frame in reversed(list(stack())):
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            yield from (value for value in list(frame.f_locals.values()) if isinstance(value, nn.Module))


class Namer:
    """Finds the layers of the parameters that one graph is called with.

    Args:
        sources: by the graph's arguments: what the graph itself calls the layer, or "".
        bases: modules that the graph's function reads by a name of its own.
    """

    def __init__(self, sources: Mapping[str, str], bases: Iterable[nn.Module] = ()) -> None:
        self._sources = sources
        self._bases = [weakref.ref(module) for module in bases]

    def find(self, weights: Mapping[str, Tensor], *, anew: bool = False) -> tuple[dict[str, Layer], list[nn.Module]]:
        """The layer of each of ``weights``, and the modules by which they were named.

        Asks the stack, so it must be called while the graph's caller is on it.

        Args:
            anew: look at these modules again even where nothing has moved: parameters may have been tied since.
        """
        running = running_modules()
        owners = _owners(weights.values(), running)
        if len(owners) < len({id(weight) for weight in weights.values()}):  # a function was compiled
            bases = [module for ref in self._bases if (module := ref()) is not None]
            owners = {**_owners(weights.values(), [*_local(), *bases]), **owners}
        for known in [*running, *(base for _, _, base in owners.values())] if anew else ():
            _trees.pop(known, None)
        layers: dict[str, Layer] = {}
        roots: dict[int, nn.Module] = {}
        for name, weight in weights.items():
            if id(weight) not in owners:
                source = self._sources[name]
                layers[name] = Layer((source,) if source else ())
                continue
            module, leaf, base = owners[id(weight)]
            for root in [*reversed(running), base]:
                tree = tree_of(root, module)
                if tree.holds(module):
                    layers[name], roots[id(root)] = tree.layer(module, leaf), root
                    break
        return layers, list(roots.values())


def _owners(weights: Iterable[Tensor], modules: Iterable[nn.Module]) -> dict[int, tuple[nn.Module, str, nn.Module]]:
    """By identity of each of ``weights``: a module that holds it, under which name, and which of ``modules`` knows."""
    missing = {id(weight) for weight in weights}
    found: dict[int, tuple[nn.Module, str, nn.Module]] = {}
    for module in modules:
        if not missing:
            break
        for part in module.modules():
            for leaf, parameter in part._parameters.items():
                if id(parameter) in missing:
                    missing.remove(id(parameter))
                    found[id(parameter)] = part, leaf, module
    return found
