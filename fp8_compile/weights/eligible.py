"""Whether a linear, or a stack of experts' matrices, may become FP8: one ordered list of checks, for graphs and for
load time alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import OptionError, PatternError
from ..options import KEEP, RECOMMENDED, Fp8Options, expanded
from ..patterns import first_match_of, spellings
from ..schemes import Scheme, scheme_for
from .layers import Layer
from .quantized_weight import QuantizedWeight
from .records import ignored_by, kept_by_plan, narrower

QUANTIZABLE_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Candidate:
    """A linear that is decided on, or what multiplies by the matrices of experts.

    Attributes:
        weight: ``[N, K]``, or ``[K, N]`` if ``transposed``, or a stack of such; fake in a graph.
        layer: which layer it is.
        features: input and output features.
        transposed: the weight is stored input features first.
        written: why the way in which a graph has the linear cannot be replaced, or None.
    """

    weight: Tensor
    layer: Layer
    features: tuple[int, int]
    transposed: bool = False
    written: str | None = None


def reason(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    """Why ``candidate`` stays in high precision, or None if it may become FP8.

    Args:
        scheme: that its weight has, or would get.
    """
    by_name = kept_by_name(candidate.layer, options)
    return unfit(candidate, options, scheme) if by_name is None else by_name


def unfit(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    """Why ``candidate`` stays whichever layer it is, or None."""
    return next((found for check in CHECKS if (found := check(candidate, options, scheme)) is not None), None)


def pattern_of(layer: Layer, options: Fp8Options) -> str | None:
    """The entry that lets ``layer`` stay: of ``ignored_layers``, or the recipe that it stands for, or of ``layers``."""
    entry = entry_of(layer, options)
    return entry if entry is not None and options.layers[entry] == KEEP else _ignored(layer, options)


def _ignored(layer: Layer, options: Fp8Options) -> str | None:
    """None for an adapter, whose name is that of the layer that it adapts."""
    return None if layer.adapter else first_match_of(expanded(options.ignored_layers, layer.keeps), layer.names)


def entry_of(layer: Layer, options: Fp8Options) -> str | None:
    """The entry of ``layers`` that names ``layer``; none an adapter's.

    Raises:
        PatternError: an entry of ``ignored_layers`` names it, too.
    """
    if layer.adapter or not options.layers:
        return None
    entry = first_match_of(options.layers, layer.names)
    ignored = None if entry is None else _ignored(layer, options)
    if entry is not None and ignored is not None:
        raise PatternError(
            entry, f"names {layer.paths[0]}, which {ignored!r} of ignored_layers names, too; leave one out", "layers"
        )
    return entry


def kept_by_name(layer: Layer, options: Fp8Options) -> str | None:
    """Why ``layer`` stays because of what it is, whatever its weight looks like; None if it may become FP8."""
    if layer.adapter:  # first: a pattern names the layer that it adapts
        return "low-rank adapter"
    pattern = pattern_of(layer, options)
    if pattern is not None:
        return kept_by_plan(pattern) if pattern in options.layers else ignored_by(pattern)
    if layer.outside and RECOMMENDED in options.ignored_layers:
        return ignored_by(OUTSIDE)
    if not layer.paths and (options.ignored_layers or options.layers):
        return UNNAMED
    return layer.recorded


def scheme_of(layer: Layer, options: Fp8Options) -> Scheme:
    """The scheme that the weight of ``layer`` gets if it is not quantized yet.

    Its input scale may be missing still (``Scheme.input_scale_missing``), which is an error where it is needed.
    """
    scheme = scheme_for(options, entry_of(layer, options))
    if not scheme.input_scale_missing:
        return scheme
    scales = options.activation_scales
    # A weight that several layers have reads all their activations, and a fused layer has the scales of its parts.
    found = [scales[path] for path in layer.paths if path in scales] or [
        scales[name] for path in layer.paths for name in spellings(path) if name in scales
    ]
    scale = max(found, default=None)
    return scheme if scale is None and options.uncalibrated == "error" else scheme.with_input_scale(scale)


def check_calibrated(missing: Collection[str]) -> None:
    """Refuse layers, by path, that are to be static and of which no calibration tells a scale.

    Raises:
        OptionError: there is one.
    """
    if missing:
        named = ", ".join(path or "a linear without a name" for path in dict.fromkeys(missing))
        raise OptionError(
            f"activation_scheme='static': no input scale for {named}; calibrate the model "
            "(fp8_compile.calibrate) and give activation_scales, or uncalibrated='dynamic'"
        )


def called(weight: Tensor, layer: Layer, options: Fp8Options) -> Scheme:
    """The scheme by which ``weight`` runs: its own, with what may be chosen anew when a graph is compiled.

    Raises:
        OptionError: the options have another input scale for it.
    """
    if not isinstance(weight, QuantizedWeight):
        return scheme_of(layer, options)
    if weight.scheme.static and options.activation_scales:
        asked = scheme_of(layer, options)
        if asked.static and not asked.input_scale_missing and asked.constants_key() != weight.scheme.constants_key():
            raise OptionError(
                f"activation_scales: the weight of {layer.paths[0]} was quantized with another input scale; leave the "
                "option out, or load the weights anew with it"
            )
    return weight.scheme.called_with(options.asked_of(entry_of(layer, options))[1])


def read_by(name: str) -> str:
    """The reason of a matrix that is handed to a function which multiplies by it itself."""
    return f"read by {name}, which is no linear"


_TAKES_WEIGHTS = ("multi_head_attention_forward", "_transformer_encoder_layer_fwd")


def handed_over(model: nn.Module) -> dict[int, str]:
    """The linears of ``model``, by identity, that are not called: their module hands the weights to a function.

    As nn.MultiheadAttention does, and the attention pools that are written after it. Told by the names in the code of
    the module's ``forward``, so that load time leaves what a graph would.

    Returns:
        The function's name.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        code = getattr(getattr(type(module), "forward", None), "__code__", None)  # a ScriptModule's class has none
        name = next((name for name in _TAKES_WEIGHTS if code is not None and name in code.co_names), None)
        if name is not None:
            found |= {id(part): name for part in module.children() if isinstance(part, nn.Linear)}
    return found


EXPERTS = "experts: a parameter of three dimensions"
LOOP = f"{EXPERTS}, multiplied one by one; use_grouped_mm=True in the model's configuration multiplies all at once"


def multiplied_otherwise(module: nn.Module) -> str | None:
    """Why the stacks of experts' matrices in ``module`` are not multiplied by `grouped_mm`, or None if they are.

    Told by the attribute that diffusers' modules of experts have, so that load time leaves what a graph would. Such
    modules hold their matrices as ``[E, K, N]``.
    """
    grouped = getattr(module, "use_grouped_mm", None)
    return None if grouped else EXPERTS if grouped is None else LOOP


OUTSIDE = f"{RECOMMENDED}: outside of the repeated blocks"
UNNAMED = "nothing names this layer, and a pattern may mean it"


def _written(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    return candidate.written


def _transposed(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    """The scales of a quantized weight belong to what are input features here."""
    if not isinstance(candidate.weight, QuantizedWeight):
        return None
    return "used with its features exchanged" if candidate.transposed != (candidate.weight.dim() == 3) else None


def _subclass(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    """Seen through the fake tensor that stands for a plain one."""
    from torch._subclasses.fake_tensor import FakeTensor

    kind = type(candidate.weight)
    known = (Tensor, torch.nn.Parameter, FakeTensor, QuantizedWeight)
    return None if kind in known else f"weight is a {kind.__name__}"


def _dtype(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    dtype = candidate.weight.dtype
    if dtype in QUANTIZABLE_DTYPES:
        return None
    return f"weight is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"


def _narrow(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    quantized = isinstance(candidate.weight, QuantizedWeight)
    return None if quantized else narrower(candidate.features, options.min_features)


def _scheme(candidate: Candidate, options: Fp8Options, scheme: Scheme) -> str | None:
    if isinstance(candidate.weight, QuantizedWeight):
        return None  # how it runs is another question
    in_features, out_features = candidate.features
    if candidate.weight.dim() == 3 and scheme.no_experts is not None:
        return scheme.no_experts
    return scheme.reason(out_features, in_features, candidate.weight.dtype)


CHECKS: tuple[Callable[[Candidate, Fp8Options, Scheme], str | None], ...] = (
    _written,  # before those that need a matrix
    _transposed,
    _subclass,
    _dtype,
    _narrow,
    _scheme,
)
"""The first that finds a reason decides."""
