"""Marks on modules that keep graphs of different decisions apart.

One graph of Dynamo's serves all modules that look alike, and a layer's name is nothing that it looks at. So each module
bears what was decided on its weights by their names, and each graph is guarded on it: a graph that quantizes a linear
is not for a module that says "stays", nor the other way round, and where ``layers`` asks for several schemes, a graph
of one is not for a module that says another. A module without a mark fits all; the binder decides then
(`fp8_compile.runtime.binder`).

What was decided on an attention by its name is marked likewise, beside the weights of linears that are below the same
module (`attention_leaf`).

A mark belongs to one set of options, since a model may be compiled with several. It is on the module and not on the
parameter because offloading puts new parameters in place at every call.
"""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from ..options import Fp8Options
from ..schemes import Scheme, scheme_for
from . import eligible
from .layers import Layer, tree_of

_PREFIX = "_fp8_mark_"

STAYS, CONVERTS = "stays", "converts"


def verdict(layer: Layer, options: Fp8Options) -> str:
    """What a mark says of ``layer``: that it stays, or the scheme that it gets, or is called with."""
    if eligible.kept_by_name(layer, options) is not None:
        return STAYS
    return _of(eligible.scheme_of(layer, options)) if several(options) else CONVERTS


MOST_ABOVE = 2
"""A linear and the attention that it feeds are below one module, so many segments above the linear at most."""


def attention_verdict(layer: Layer, options: Fp8Options) -> str:
    """What a mark says of an attention, by its `Layer`."""
    return CONVERTS if eligible.kept_by_name(layer, options) is None else STAYS


def attention_leaf(leaf: str, above: int) -> str:
    """What stands for an attention where marks name the parameter ``leaf`` of a linear."""
    return f"{leaf}_attention{above}"


def verdicts(options: Fp8Options) -> set[str]:
    """All that marks may say under ``options``."""
    if not several(options):
        return {STAYS, CONVERTS}
    schemes = {scheme_for(options, pattern) for pattern in options.askable}
    if options.uncalibrated == "dynamic":
        schemes |= {scheme.with_input_scale(None) for scheme in schemes if scheme.input_scale_missing}
    return {STAYS, *map(_of, schemes)}


def several(options: Fp8Options) -> bool:
    """Whether layers may get different schemes."""
    return bool(options.layers) or options.uncalibrated == "dynamic"


def _of(scheme: Scheme) -> str:
    return hashlib.sha256(repr((scheme.method, scheme.common_options)).encode()).hexdigest()[:12]


def name_of(options: Fp8Options, leaf: str, verdict: str) -> str:
    """The attribute of a module that says ``verdict`` of its parameter ``leaf``."""
    return f"{_PREFIX}{options.names_key}_{verdict}_{leaf}"


def mark(root: nn.Module, options: Fp8Options, *, anew: bool = False) -> None:
    """Mark all modules of ``root``, unless that has been done; ``anew`` does it in any case."""
    tree = tree_of(root)
    if options.names_key in tree.marked and not anew:
        return
    tree.marked.add(options.names_key)
    for module, leaf in tree.matrices():
        layer = tree.layer(module, leaf)
        put(module, options, leaf, verdict(layer, options))
        put_of_attentions(module, options, leaf, layer)


def put_of_attentions(holder: nn.Module | Tensor, options: Fp8Options, leaf: str, layer: Layer) -> None:
    """Mark what ``leaf`` says of attentions, where names may decide on them."""
    if not options.fp8_attention or not options.patterns:
        return
    for above in range(1, MOST_ABOVE + 1):
        verdict = attention_verdict(layer.attention(above), options)
        put(holder, options, attention_leaf(leaf, above), verdict)


def put(holder: nn.Module | Tensor, options: Fp8Options, leaf: str, verdict: str) -> None:
    """Mark a module in view of its parameter ``leaf``; or, as "", a parameter that the graph takes from elsewhere."""
    prefix = f"{_PREFIX}{options.names_key}_"
    for name in [name for name in holder.__dict__ if name.startswith(prefix)]:
        if name.removeprefix(prefix).partition("_")[2] == leaf:
            del holder.__dict__[name]
    holder.__dict__[name_of(options, leaf, verdict)] = True


def remove(model: nn.Module) -> None:
    """Take the marks of all options off ``model``, whose layers will be decided on anew."""
    for holder in (*model.modules(), *model.parameters()):
        for name in [name for name in holder.__dict__ if name.startswith(_PREFIX)]:
            del holder.__dict__[name]
