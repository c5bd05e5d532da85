"""Marks on modules that keep graphs of different decisions apart.

One graph of Dynamo's serves all modules that look alike, and a layer's name is nothing that it looks at. So each module
bears what was decided on its weights by their names, and each graph is guarded on it: a graph that quantizes a linear
is not for a module that says "stays", nor the other way round. A module without a mark fits both; the binder decides
then (`fp8_compile.runtime.binder`).

A mark belongs to one list of patterns, since a model may be compiled with several. It is on the module and not on the
parameter because offloading puts new parameters in place at every call.
"""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from ..options import Fp8Options
from . import eligible
from .layers import tree_of

_PREFIX = "_fp8_mark_"


def name_of(options: Fp8Options, leaf: str, *, stays: bool) -> str:
    """The attribute of a module that says of its parameter ``leaf`` that it stays, or that it may become FP8."""
    digest = hashlib.sha256(repr(options.ignored_layers).encode()).hexdigest()[:12]
    return f"{_PREFIX}{digest}_{'stays' if stays else 'converts'}_{leaf}"


def mark(root: nn.Module, options: Fp8Options, *, anew: bool = False) -> None:
    """Mark all modules of ``root``, unless that has been done; ``anew`` does it in any case."""
    tree = tree_of(root)
    if options.ignored_layers in tree.marked and not anew:
        return
    tree.marked.add(options.ignored_layers)
    for module, leaf in tree.matrices():
        put(module, options, leaf, stays=eligible.kept_by_name(tree.layer(module, leaf), options) is not None)


def put(holder: nn.Module | Tensor, options: Fp8Options, leaf: str, *, stays: bool) -> None:
    """Mark a module in view of its parameter ``leaf``; or, as "", a parameter that the graph takes from elsewhere."""
    holder.__dict__.pop(name_of(options, leaf, stays=not stays), None)
    holder.__dict__[name_of(options, leaf, stays=stays)] = True


def remove(model: nn.Module) -> None:
    """Take the marks of all options off ``model``, whose layers will be decided on anew."""
    for holder in (*model.modules(), *model.parameters()):
        for name in [name for name in holder.__dict__ if name.startswith(_PREFIX)]:
            del holder.__dict__[name]
