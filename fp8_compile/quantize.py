"""Convert a model's weights to FP8 when it is loaded: in place, a layer at a time."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .device import check_device
from .errors import (
    NonFiniteWeightError,
    NothingConvertedError,
    NothingConvertedWarning,
    OptionError,
    PatternError,
    UnmatchedPatternWarning,
)
from .options import Fp8Options
from .passes.plan import weight_objection
from .patterns import check_unmatched, first_match, is_adapter, layer_path
from .schemes.fp8 import ROW, TENSOR, Scheme, scheme_for
from .weights import lora
from .weights.quantized_weight import Fp8Weight, KeptWeight, adopt


@torch.no_grad()
def quantize_(
    model: nn.Module,
    options: Fp8Options | Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Replace the weights of ``model``'s linear layers by `Fp8Weight` parameters, in place.

    The weights that the backend would convert are converted, by the same options and for the same reasons. How many
    rows a layer will see is not known yet, which is why ``few_rows="keep"`` is refused.
    ``torch.compile(model, backend="fp8_diffusion")`` needs no options afterwards, and converts nothing more.

    A parameter that is a ``Float8Tensor`` of torchao's, with a scale per output channel or one in all, becomes an
    `Fp8Weight` in the same memory: its bytes are used as they are.

    Args:
        model: a transformer or a text encoder in bfloat16 or float16.
        options: see `Fp8Options`. What concerns compilation alone is for ``torch.compile`` and is ignored here.
        device: where the model goes: its weights one by one and a few rows at a time, quantized there, so that it never
            holds more than what stays and less than one layer of BF16. None leaves everything where it is.

    Raises:
        TypeError: ``model`` is no module.
        OptionError: an option is invalid or cannot be served at load time: ``few_rows="keep"``, or a method whose
            weights are no FP8 matrix with a scale.
        PatternError: an entry of ``ignored_layers`` is malformed or misspelt, or names only layers that are in FP8
            already; nothing has been converted.
        UnsupportedDeviceError: ``device`` has no FP8 matrix multiplication; nothing has been converted.
        NothingConvertedError: under ``strict``, but not where layers are in FP8 from an earlier call.
        NonFiniteWeightError: weights hold NaN or Inf. It names all of them; they stay, and the others are converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module belongs here, for example pipeline.transformer, not {type(model).__name__}")
    options = Fp8Options.parse(options)
    target = None if device is None else torch.device(device)
    if target is not None:
        check_device(target)
    choices = choose(model, options)
    check_choices(choices, options, _in_fp8(model))
    if any(choice.reason is None for choice in choices):
        _attach_to_library(model, options)
    convert(model, choices, options, target)


def convert(
    model: nn.Module, choices: Sequence[Choice], options: Fp8Options, target: torch.device | None = None
) -> None:
    """Carry out ``choices`` on ``model``, and move it to ``target``.

    Raises:
        NonFiniteWeightError: see `quantize_`.
    """
    broken = []
    for choice in _progress([c for c in choices if c.reason is None], "Quantizing to FP8"):
        made = quantized(choice.weight, options, target)
        if made is None:
            broken.append(choice.paths[0])
            choice.reason = "NaN or Inf in the weight"
        else:
            choice.put(made)
    keep_others(model, choices)
    if target is not None:
        model.to(target)
    remember(model, choices, options)
    if broken:
        raise NonFiniteWeightError(broken)


def quantized(weight: Tensor, options: Fp8Options, device: torch.device | None = None) -> Fp8Weight | None:
    """The parameter that ``weight`` becomes, on ``device``; None if it holds NaN or Inf."""
    min_rows = None if options.min_rows == Fp8Options.min_rows else options.min_rows
    adopted = adopt(weight)
    if adopted is None:
        made = Fp8Weight.quantize(weight, options.granularity, min_rows=min_rows, device=device)
    else:
        made = adopted if device is None else adopted.to(device)  # type: ignore[assignment]
    # A NaN or Inf of the weight reaches its scale through the amax.
    if made.device.type != "meta" and not made.scale.isfinite().all():
        return None
    return Fp8Weight(made)


@dataclass
class Choice:
    """What becomes of one parameter, which may belong to several linears.

    Attributes:
        paths: of these linears, as `layer_path` gives them.
        reason: why it is kept; None if it becomes FP8.
        pattern: the entry of ``ignored_layers`` that names it.
    """

    weight: Tensor
    modules: list[nn.Module]
    paths: list[str]
    reason: str | None
    pattern: str | None

    def put(self, parameter: Tensor) -> None:
        """Make ``parameter`` the weight of these linears. The old one is free then, before the next is quantized."""
        self.weight = parameter
        for module in self.modules:
            module._parameters["weight"] = parameter  # type: ignore[assignment]


def scheme_at_load(options: Fp8Options) -> Scheme:
    """The scheme whose weights parameters shall hold.

    Raises:
        OptionError: the method, or another option, cannot be served before a graph is seen.
    """
    scheme = scheme_for(options)
    if scheme.quantize_weight not in (ROW.quantize_weight, TENSOR.quantize_weight):
        raise OptionError(
            f"method={options.method!r}: its weights are no FP8 matrix with a scale per row or one in all, which is "
            "what a parameter can hold; use it with torch.compile alone"
        )
    if options.few_rows != "weight-only":
        raise OptionError(
            f"few_rows={options.few_rows!r}: at load time it is not known how many rows a layer will see; use "
            "'weight-only', and name the layers that shall stay as they are in ignored_layers"
        )
    return scheme


def choose(model: nn.Module, options: Fp8Options) -> list[Choice]:
    """Decide on the weights of all linears of ``model`` that are no adapters and not in FP8 yet.

    Raises:
        OptionError: see `scheme_at_load`.
    """
    scheme = scheme_at_load(options)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    choices: dict[int, Choice] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is None or is_adapter(name) or isinstance(weight, Fp8Weight):
            continue
        path = layer_path(name)
        pattern = first_match(options.ignored_layers, path)
        if id(weight) in choices:
            choice = choices[id(weight)]
            choice.modules.append(module)
            choice.paths.append(path)
            if pattern is not None and choice.pattern is None:
                choice.reason, choice.pattern = f"ignored_layers: {pattern}", pattern
            continue
        features = (module.in_features, module.out_features)
        reason = (
            _already_kept(weight)
            or (f"ignored_layers: {pattern}" if pattern is not None else None)
            or (None if adopt(weight) is not None else weight_objection(weight, features, options))
            or scheme.refuses(*features, weight.dtype)
        )
        choices[id(weight)] = Choice(weight, [module], [path], reason, pattern)
    for key, choice in choices.items():
        if choice.reason is None and len(choice.modules) < len(owners[key]):
            others = [n for n in owners[key] if layer_path(n.rpartition(".")[0]) not in choice.paths]
            choice.reason = f"weight is shared with {', '.join(others)}"
    return list(choices.values())


def _already_kept(weight: Tensor) -> str | None:
    return weight.reason if isinstance(weight, KeptWeight) else None


def _in_fp8(model: nn.Module) -> list[str]:
    """Paths of the linears whose weights were converted earlier."""
    return [
        layer_path(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module._parameters.get("weight"), Fp8Weight)
    ]


def check_choices(choices: Sequence[Choice], options: Fp8Options, in_fp8: Sequence[str] = ()) -> None:
    """Complain of patterns that matched nothing, and of a model in which nothing will be converted.

    Args:
        in_fp8: paths of linears that are no choice any more.
    """
    paths = [path for choice in choices for path in choice.paths]
    unmatched = unmatched_patterns(choices, options)
    for pattern in options.ignored_layers:
        late = [path for path in in_fp8 if first_match([pattern], path) is not None]
        if late and pattern in unmatched:
            raise PatternError(pattern, f"names {late[0]}, which is in FP8 already; load the model anew")
        if late:
            message = f"ignored_layers: {pattern!r} names {late[0]} too, which is in FP8 already and stays so"
            warnings.warn(message, UnmatchedPatternWarning, stacklevel=4)
    for pattern in unmatched:
        check_unmatched(pattern, [*paths, *in_fp8], whole_model=True)
        warnings.warn(
            f"ignored_layers: {pattern!r} matched none of the {len(paths) + len(in_fp8)} linears of this model",
            UnmatchedPatternWarning,
            stacklevel=4,
        )
    if in_fp8 and not choices:
        message = f"all {len(in_fp8)} linears of this model are in FP8 already; these options changed nothing"
        warnings.warn(message, NothingConvertedWarning, stacklevel=4)
    if choices and all(choice.reason is not None for choice in choices):
        reasons = dict.fromkeys(str(choice.reason) for choice in choices)
        counts = "; ".join(f"{sum(c.reason == reason for c in choices)} x {reason}" for reason in reasons)
        others = f" that are not in FP8 yet ({len(in_fp8)} are)" if in_fp8 else ""
        message = f"none of the {len(paths)} linears of this model{others} became FP8: {counts}"
        if options.strict and not in_fp8:
            raise NothingConvertedError(message)
        warnings.warn(message, NothingConvertedWarning, stacklevel=4)


def unmatched_patterns(choices: Sequence[Choice], options: Fp8Options) -> tuple[str, ...]:
    """The entries of ``ignored_layers`` that name no linear."""
    paths = [path for choice in choices for path in choice.paths]
    return tuple(p for p in options.ignored_layers if not any(first_match([p], path) for path in paths))


def keep_others(model: nn.Module, choices: Sequence[Choice]) -> None:
    """Mark the weights that stay, so that the backend does not convert them after all."""
    reasons = {id(c.weight): c.reason for c in choices if c.reason is not None}
    made: dict[int, KeptWeight] = {}
    for path, module in model.named_modules():
        if is_adapter(path):
            continue
        for name, parameter in list(module._parameters.items()):
            if type(parameter) is not nn.Parameter or parameter.dim() != 2 or not parameter.is_floating_point():
                continue
            key = id(parameter)
            if key not in made:
                reason = reasons.get(key, "no nn.Linear's weight when the model was quantized")
                made[key] = KeptWeight(parameter.data, parameter.requires_grad, reason)
            module._parameters[name] = made[key]


_LIBRARIES = {
    "diffusers": ("diffusers.models.modeling_utils", "ModelMixin"),
    "transformers": ("transformers.modeling_utils", "PreTrainedModel"),
}


def _attach_to_library(model: nn.Module, options: Fp8Options) -> None:
    for quantizer, (module, kind) in _LIBRARIES.items():
        loaded, modeling = sys.modules.get(f"{__package__}.integrations.{quantizer}"), sys.modules.get(module)
        if loaded is None or modeling is None or hasattr(model, "hf_quantizer"):
            continue
        if isinstance(model, getattr(modeling, kind)):
            loaded.attach(model, options)


_unmatched: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, choices: Sequence[Choice], options: Fp8Options) -> None:
    """Keep for the report which patterns matched nothing, and watch what PEFT will do to the model."""
    lora.watch_merges()
    _unmatched[model] = unmatched_patterns(choices, options)


def unmatched_at_load(model: nn.Module) -> tuple[str, ...]:
    """The patterns that matched nothing when ``model``, or parts of it, were quantized."""
    return tuple(dict.fromkeys(p for module in model.modules() for p in _unmatched.get(module, ())))


def _progress(choices: Sequence[Choice], description: str) -> Iterator[Choice]:
    """``choices``, with a bar if they take longer than a moment and tqdm is there (diffusers brings it)."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield from choices
        return
    bar: Iterable[Choice] = tqdm(choices, description, unit="layer", delay=2, leave=False)
    yield from bar
