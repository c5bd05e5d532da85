"""What is asked of Dynamo: where a graph's parameters come from, guards on their modules, how many graphs are left.

The sources that Dynamo keeps of each placeholder are classes of its own, and so are its guards. torch 2.11 to 2.13:
https://github.com/pytorch/pytorch/blob/main/torch/_dynamo/source.py, ``guards.py`` beside it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..passes.linears import parameter_path_of


def sources(gm: GraphModule) -> dict[str, str]:
    """What ``gm``, Dynamo's graph, calls the layer of each placeholder; "" if it has no name for it."""
    return {node.name: parameter_path_of(node) for node in gm.graph.find_nodes(op="placeholder")}


def bases(gm: GraphModule) -> list[nn.Module]:
    """The modules that the function being compiled reads by names of its own, from which it takes parameters."""
    translator = _translator()
    if translator is None:
        return []
    found: dict[int, nn.Module] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        source: Any = getattr(node, "_dynamo_source", None)
        while getattr(source, "base", None) is not None:
            source = source.base
        local, named = getattr(source, "local_name", None), getattr(source, "global_name", None)
        value = translator.f_locals.get(local) if local is not None else translator.f_globals.get(named)
        value = getattr(value, "cell_contents", value)
        if isinstance(value, nn.Module):
            found[id(value)] = value
    return list(found.values())


def _translator() -> Any:
    """What interprets the function that is being compiled; None outside of Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:  # nothing is being compiled
        return None


def guard_absence(placeholder: Node, attribute: Callable[[str], str]) -> None:
    """Let Dynamo use the graph only while the module that holds a parameter has no ``attribute`` of its own.

    A parameter that the function does not take out of a module is asked itself.

    Args:
        attribute: its name, from the parameter's in the module, or from "".
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    source, leaf = _holder(placeholder) or (getattr(placeholder, "_dynamo_source", None), "")
    if source is not None:
        guard = functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr=attribute(leaf))
        install_guard(source.make_guard(guard))


def holder(placeholder: Node) -> tuple[nn.Module, str] | None:
    """The module that `guard_absence` asks of, and the parameter's name in it; None if it asks of none."""
    found, translator = _holder(placeholder), _translator()
    if found is None or translator is None:
        return None
    source, leaf = found
    root = translator.output.root_tx
    try:
        module = eval(source.name, {"L": root.f_locals, "G": root.f_globals})  # as Dynamo's guards do
    except (NameError, AttributeError, LookupError, TypeError, SyntaxError):  # a name that only those know
        return None
    return (module, leaf) if isinstance(module, nn.Module) else None


def _holder(placeholder: Node) -> tuple[Any, str] | None:
    """Dynamo's source of the module that holds a parameter, and the parameter's name in it."""
    source: Any = getattr(placeholder, "_dynamo_source", None)
    module = getattr(getattr(source, "base", None), "base", None)
    if module is None or getattr(source.base, "member", None) != "_parameters":
        return None
    return module, source.index


def being_compiled() -> str:
    """The function that Dynamo begins to compile, for its callbacks, which are not told: ``Block.forward``; "" if none.

    It is a local variable of ``_compile`` in torch/_dynamo/convert_frame.py (torch 2.11 to 2.13), which calls them.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_compile":
        frame = frame.f_back
    code = None if frame is None else frame.f_locals.get("code")
    return code.co_qualname if isinstance(code, CodeType) else ""


def last_graph() -> tuple[CodeType, int] | None:
    """The function that is being compiled, and Dynamo's limit on its graphs, if this graph is the last one in it."""
    translator = _translator()
    if translator is None:
        return None
    earlier = len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(translator.f_code))
    limit = torch._dynamo.config.recompile_limit
    # Not of the only graph that a limit of 1 allows: such a limit is there to forbid a second one.
    return (translator.f_code, limit) if earlier > 0 and earlier + 1 >= limit else None
