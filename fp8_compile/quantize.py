"""Convert a model's weights to FP8 when it is loaded: in place, a layer at a time."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .checks import (
    check_agreement,
    complain_of_nothing,
    parse_options,
    warn_of_unmatched,
    warn_of_unused_scales,
    with_recipe,
)
from .device import check_device
from .errors import NonFiniteWeightError, NothingConvertedWarning, PatternError, UnmatchedPatternWarning
from .options import Fp8Options
from .patterns import Pattern, is_adapter, join, layer_path, parameter_layer
from .runtime.binder import forget_bindings
from .runtime.constants import forget_weights
from .schemes import Scheme, finite, scheme_for
from .weights import eligible, lora, marks
from .weights.eligible import Candidate
from .weights.layers import Tree, all_parameters, forget_trees, is_matrix, stacks
from .weights.quantized_weight import QuantizedWeight
from .weights.records import (
    NOT_A_LINEAR,
    Record,
    delete_records,
    ignored_by,
    kept_by_plan,
    note_kept,
    record_of,
    write_record,
)

on_converted: list[Callable[[nn.Module, Fp8Options], None]] = []
"""Called with each model that is converted, or loaded, in memory, and all that it was asked: how integrations learn."""

adopters: list[Callable[[Tensor], QuantizedWeight | None]] = []
"""Asked of each weight: integrations turn quantized weights of other libraries into ours, in the same memory."""


@torch.no_grad()
def quantize_(
    model: nn.Module,
    options: Fp8Options | Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Replace the weights of ``model``'s linear layers, and of its experts, by `QuantizedWeight` parameters, in place.

    The weights that the backend would convert are converted, by the same options and for the same reasons. How many
    rows a layer will see is not known yet, which is why ``small_m="keep"`` is refused.
    ``torch.compile(model, backend="fp8_diffusion")`` needs no options afterwards, and converts nothing more.

    A parameter that is a ``Float8Tensor`` of torchao's, with a scale per output channel or one in all, becomes a
    `QuantizedWeight` in the same memory: its bytes are used as they are.

    Args:
        model: a transformer or a text encoder in bfloat16 or float16.
        options: see `Fp8Options`. What concerns compilation alone is for ``torch.compile`` and is ignored here.
        device: target device. Weights are moved and quantized one at a time; peak memory is the quantized model plus
            one layer. None leaves everything where it is.

    Raises:
        TypeError: ``model`` is no module.
        OptionError: an option is invalid, or cannot be served at load time: ``small_m="keep"``.
        PatternError: an entry of ``ignored_layers`` or ``layers`` is malformed or misspelt, or names only layers that
            are quantized already; nothing has been converted.
        UnsupportedDeviceError: ``device`` cannot run the method; nothing has been converted.
        NothingConvertedError: under ``strict``, but not where layers are in FP8 from an earlier call.
        NonFiniteWeightError: weights hold NaN or Inf. It names all of them; they stay, and the others are converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, for example pipeline.transformer, got {type(model).__name__}")
    options = with_recipe(parse_options(options), model, stacklevel=2)
    target = None if device is None else torch.device(device)
    choices = choose(model, options)
    check_scales(model, choices, options)
    if target is not None:
        for scheme in dict.fromkeys(choice.scheme for choice in choices if choice.reason is None):
            check_device(target, scheme)
    prequantized = prequantized_in(model)
    check_choices(model, choices, options, prequantized)
    some = bool(prequantized) or any(choice.reason is None for choice in choices)
    try:
        convert(model, choices, options, target)
    finally:  # with a broken weight, the others are converted
        if some:
            for hook in on_converted:
                hook(model, _all_asked(model, options))


def convert(
    model: nn.Module, choices: Sequence[Choice], options: Fp8Options, target: torch.device | None = None
) -> None:
    """Carry out ``choices`` on ``model``, and move it to ``target``.

    Raises:
        NonFiniteWeightError: see `quantize_`.
    """
    broken = []
    for choice in _progress([c for c in choices if c.reason is None], "Quantizing"):
        made = quantized(choice.weight, choice.scheme, target)
        if made is None:
            broken.append(choice.paths[0])
            choice.reason = "NaN or Inf in the weight"
        else:
            choice.put(made)
    if target is not None:
        model.to(target)
    remember(model, choices, options)
    if broken:
        raise NonFiniteWeightError(broken)


def quantized(weight: Tensor, scheme: Scheme, device: torch.device | None = None) -> QuantizedWeight | None:
    """The parameter that ``weight`` becomes, on ``device``; None if it holds NaN or Inf."""
    adopted = adopt(weight)
    if adopted is None:
        made = QuantizedWeight.quantize(weight, scheme, device)
    else:
        made = adopted if device is None else adopted.to(device)  # type: ignore[assignment]
    return QuantizedWeight(made) if made.is_meta or finite(made.constants) else None


def adopt(weight: Tensor) -> QuantizedWeight | None:
    """A quantized weight of another library as ours, in the same memory; None if ``weight`` is no such thing."""
    return next((made for adopter in adopters if (made := adopter(weight)) is not None), None)


@dataclass
class Choice:
    """What becomes of one parameter, which may belong to several linears.

    Attributes:
        owners: the modules of these linears, or of a stack of experts' matrices; and its name in each.
        paths: of these linears, as `layer_path` gives them.
        reason: why it is kept; None if it becomes FP8.
        scheme: that it gets then.
        pattern: the entry of ``ignored_layers``, or of ``layers``, that lets it stay.
        names: all that an entry may match.
    """

    weight: Tensor
    owners: list[tuple[nn.Module, str]]
    paths: list[str]
    reason: str | None
    scheme: Scheme
    pattern: str | None
    names: tuple[str, ...]

    @property
    def needs_scale(self) -> bool:
        """Whether its constants cannot be made for want of an input scale."""
        return self.scheme.input_scale_missing and not isinstance(self.weight, QuantizedWeight)

    @property
    def parameters(self) -> list[str]:
        """All names of the parameter, as in ``named_parameters``, without those of wrappers."""
        leaves = ("weight" if leaf == "weight" else "" for _, leaf in self.owners)
        return [join(path, leaf) for path, leaf in zip(self.paths, leaves, strict=True)]

    def put(self, parameter: Tensor) -> None:
        """Make ``parameter`` the weight of these linears. The old one is free then, before the next is quantized."""
        self.weight = parameter
        for module, leaf in self.owners:
            module._parameters[leaf] = parameter  # type: ignore[assignment]


LASTING = (ignored_by(""), kept_by_plan("").partition(" ")[0], "refilled by ")
"""How reasons begin that hold against a second conversion, which otherwise decides on what the first has left."""


def check_at_load(options: Fp8Options) -> None:
    """Refuse options that cannot be served before a graph is seen.

    Raises:
        OptionError: names the option.
    """
    for pattern in options.askable:
        scheme_for(options, pattern).check_at_load()


def choose(model: nn.Module, options: Fp8Options) -> list[Choice]:
    """Decide on the weights of all linears and experts of ``model`` that are no adapters and not quantized yet.

    Raises:
        OptionError: see `check_at_load`.
        PatternError: a layer is named by ``ignored_layers`` and by ``layers``.
    """
    check_at_load(options)
    schemes: dict[Any, Scheme] = {}  # one object where that is possible: guards compare it at every call
    owners: dict[int, dict[tuple[int, str], str]] = {}  # a module that has two paths is one
    for path, module, leaf, parameter in all_parameters(model):
        owners.setdefault(id(parameter), {}).setdefault((id(module), leaf), join(path, leaf))
    tree, handed_over = Tree(model), eligible.handed_over(model)
    choices: dict[int, Choice] = {}
    for path, module, leaf, weight in weights_in(model):
        if isinstance(weight, QuantizedWeight):
            continue
        if id(weight) in choices:
            choices[id(weight)].owners.append((module, leaf))
            choices[id(weight)].paths.append(path)
            continue
        layer = tree.layer(module, leaf)
        if layer.recorded is not None and not layer.recorded.startswith(LASTING):
            layer = replace(layer, recorded=None)  # it is decided on anew
        pattern = eligible.pattern_of(layer, options)
        adopted = adopt(weight)
        if adopted is not None and pattern is None:
            check_agreement(options, adopted.scheme, eligible.entry_of(layer, options))
        if isinstance(module, nn.Linear):
            written = eligible.read_by(handed_over[id(module)]) if id(module) in handed_over else None
            features, transposed = (module.in_features, module.out_features), False
        else:
            written = eligible.multiplied_otherwise(module)
            features, transposed = (weight.shape[1], weight.shape[2]), True
        candidate = Candidate(weight if adopted is None else adopted, layer, features, transposed, written)
        scheme = eligible.scheme_of(layer, options) if adopted is None else adopted.scheme
        scheme = schemes.setdefault((scheme, scheme.constants_key()), scheme)
        reason = eligible.reason(candidate, options, scheme)
        choices[id(weight)] = Choice(weight, [(module, leaf)], [path], reason, scheme, pattern, layer.names)
    for key, choice in choices.items():
        if choice.reason is None and len(choice.owners) < len(owners[key]):
            ours = {(id(module), leaf) for module, leaf in choice.owners}
            others = [name for owner, name in owners[key].items() if owner not in ours]
            choice.reason = f"weight is shared with {', '.join(others)}"
    return list(choices.values())


def weights_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """What may become FP8, adapters aside: the path of each layer, its module, the parameter and its name there."""
    for name, module in model.named_modules():
        if is_adapter(name):
            continue
        if not isinstance(module, nn.Linear):
            found: Iterable[tuple[str, nn.Parameter]] = stacks(module)
        else:
            weight = module._parameters.get("weight")
            found = () if weight is None else (("weight", weight),)
        for leaf, weight in found:
            yield layer_path(parameter_layer(name, leaf)), module, leaf, weight


def check_scales(model: nn.Module, choices: Iterable[Choice], options: Fp8Options) -> None:
    """Refuse ``choices`` that are to be static and have no scale, and complain of scales that name no layer.

    Raises:
        OptionError: there is one; it names all.
    """
    missing = [path for choice in choices if choice.reason is None for path in choice.paths if choice.needs_scale]
    eligible.check_calibrated(missing)
    if options.activation_scales:
        tree = Tree(model)
        warn_of_unused_scales(options, [*tree.names, *tree.others], "this model", stacklevel=4)


def prequantized_in(model: nn.Module) -> list[str]:
    """Paths of the linears and experts whose weights were converted earlier."""
    return [path for path, _, _, weight in weights_in(model) if isinstance(weight, QuantizedWeight)]


def check_choices(
    model: nn.Module, choices: Sequence[Choice], options: Fp8Options, prequantized: Sequence[str] = ()
) -> None:
    """Complain of patterns that matched nothing, and of a model in which nothing will be converted.

    Args:
        prequantized: paths of linears that are no choice any more.
    """
    paths = [path for choice in choices for path in choice.paths]
    attentions = Tree(model).attentions if options.fp8_attention else ()
    unmatched = options.unmatched([*(name for choice in choices for name in choice.names), *attentions])
    for pattern, option in options.patterns.items():
        late = list(filter(Pattern(pattern).matches, prequantized))
        if late and pattern in unmatched:
            raise PatternError(pattern, f"names {late[0]}, which is quantized already; load the model anew", option)
        if late:
            message = f"{option}: {pattern!r} names {late[0]} too, which is quantized already and stays so"
            warnings.warn(message, UnmatchedPatternWarning, stacklevel=4)
    linears = [*paths, *prequantized]
    warn_of_unmatched(unmatched, linears, "this model", count=len(linears), stacklevel=4)
    if prequantized and not choices:
        message = f"all {len(prequantized)} linears of this model are quantized already; these options changed nothing"
        warnings.warn(message, NothingConvertedWarning, stacklevel=4)
    if choices and all(choice.reason is not None for choice in choices):
        others = f" that are not quantized yet ({len(prequantized)} are)" if prequantized else ""
        complain_of_nothing(
            Counter(str(choice.reason) for choice in choices for _ in choice.paths),
            f"linears of this model{others}",
            strict=options.strict and not prequantized,
            stacklevel=4,
        )


def remember(model: nn.Module, choices: Sequence[Choice], options: Fp8Options) -> None:
    """Let ``model`` keep what it was asked and what stayed, so that the backend leaves it too; watch PEFT's merging."""
    lora.watch_merges()
    while model._modules.keys() == {"_orig_mod"}:  # torch.compile's, which the model, called by itself, does not know
        model = model.get_submodule("_orig_mod")
    earlier = record_of(model)
    kept = {} if earlier is None else dict(earlier.kept)
    unmatched = () if earlier is None else earlier.unmatched
    for choice in choices:
        for path in choice.paths:
            if choice.reason is None:
                kept.pop(path, None)
            else:
                kept[path] = choice.reason
        for module, leaf in choice.owners:
            note_kept(module, leaf, choice.reason)
    decided = {(id(module), leaf) for _, module, leaf, _ in weights_in(model)}
    for path, module, leaf, parameter in all_parameters(model):
        if is_matrix(parameter) and (id(module), leaf) not in decided and not is_adapter(path):
            note_kept(module, leaf, NOT_A_LINEAR)
    # Of all linears: what files hold in FP8 is no choice any more.
    tree = Tree(model)
    names = [*tree.names, *(tree.attentions if options.fp8_attention else ())]
    unmatched = tuple(dict.fromkeys((*unmatched, *options.unmatched(names))))
    static = any(isinstance(p, QuantizedWeight) and p.scheme.static for p in model.parameters())
    about = options.calibrated if static else ""
    about = about or ("" if earlier is None else earlier.calibrated)
    write_record(model, Record(_all_asked(model, options).of_weights(), kept, unmatched, about))
    _decide_anew(model)


def _all_asked(model: nn.Module, options: Fp8Options) -> Fp8Options:
    """``options``, with the patterns of earlier conversions of ``model``."""
    earlier = record_of(model)
    patterns = () if earlier is None else earlier.options.get("ignored_layers", ())
    layers = {} if earlier is None else earlier.options.get("layers", {})
    return replace(
        options,
        # What was said last counts.
        ignored_layers=tuple(p for p in dict.fromkeys((*patterns, *options.ignored_layers)) if p not in options.layers),
        layers={**{p: e for p, e in layers.items() if p not in options.ignored_layers}, **options.layers},
    )


def dequantize(model: nn.Module) -> None:
    """Put plain parameters in place of all quantized ones, and let ``model`` forget what it was asked."""
    plain: dict[int, nn.Parameter] = {}
    for _, module, leaf, parameter in list(all_parameters(model)):
        if isinstance(parameter, QuantizedWeight):
            if id(parameter) not in plain:
                plain[id(parameter)] = nn.Parameter(parameter.dequantize(), requires_grad=False)
            module._parameters[leaf] = plain[id(parameter)]
    delete_records(model)
    _decide_anew(model)


def _decide_anew(model: nn.Module) -> None:
    forget_trees()
    marks.remove(model)
    forget_weights(p for p in model.parameters() if not isinstance(p, QuantizedWeight))
    forget_bindings()


def _progress(choices: Sequence[Choice], description: str) -> Iterator[Choice]:
    """``choices``, with a bar on a terminal if they take a while and tqdm is there (diffusers brings it)."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield from choices
        return
    bar: Iterable[Choice] = tqdm(choices, description, unit="layer", delay=2, leave=False, disable=None)
    yield from bar
