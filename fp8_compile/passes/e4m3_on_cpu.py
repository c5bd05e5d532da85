"""Write casts to E4M3 and back in operators that a CPU has vector instructions for.

A CPU multiplies FP8 values in another dtype (`numerics.scaled_linear`), so an activation is cast to E4M3 only to be
rounded. Inductor's casts take 20 ms for 4 M values with AVX2 (3 ms with AVX512), the rounding in float32 1.2 ms; the
values are the same to the bit. All readers then share what is stored, where each cast back would store its own.

Before::

    (1) q = convert_element_type(x, float8_e4m3fn)
    (2) a = mm(convert_element_type(convert_element_type(view(q), float32), bfloat16), ...)
    (3) b = mm(convert_element_type(convert_element_type(view(q), float32), bfloat16), ...)

After::

    (1) q = convert_element_type(rounded_to_e4m3(x), bfloat16)      of plain operators
    (2) a = mm(view(q), ...)
    (3) b = mm(view(q), ...)

With AVX2, a weight's cast to float32 becomes `numerics.decoded_e4m3`, which takes a third of the time.

It leaves alone what is on another device, FP8 values that something else reads, and all where Inductor's settings let a
C++ compiler compute otherwise than it is written (``cpp.enable_unsafe_math_opt_flag``,
``cpp.enable_floating_point_contract_flag``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from .. import numerics
from .context import Context
from .graphs import VIEWS

_CAST = torch.ops.prims.convert_element_type.default


def e4m3_on_cpu(graph: Graph, context: Context) -> int:
    """Edit ``graph``, a graph of aten operators after AOTAutograd, in place; counts the casts that it replaced."""
    if config.cpp.enable_unsafe_math_opt_flag or config.cpp.enable_floating_point_contract_flag != "off":
        return 0
    casts = [n for n in graph.find_nodes(op="call_function", target=_CAST) if _value(n).device.type == "cpu"]
    rounded = [node for node in casts if _casts(node, torch.float32, numerics.FP8_DTYPE) and _round(graph, node)]
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return len(rounded)
    # Placeholders only: an activation that is still cast to FP8 is stored like that for another reader.
    weights = [n for n in casts if n.users and _casts(n, numerics.FP8_DTYPE, torch.float32) and _is_input(n.args[0])]
    for node in weights:
        node.replace_all_uses_with(_inline(graph, node, numerics.decoded_e4m3))
        graph.erase_node(node)
    return len(rounded) + len(weights)


def _round(graph: Graph, cast: Node) -> bool:
    """Replace ``cast`` and all casts back to float32, if nothing else reads it."""
    readers = list(_readers(cast))
    views = [node for node in readers if node.target in VIEWS]
    back = [node for node in readers if node not in views]
    if not back or not all(_casts(node, numerics.FP8_DTYPE, torch.float32) for node in back):
        return False
    new = _inline(graph, cast, numerics.rounded_to_e4m3)
    onward = [user for node in back for user in node.users]
    dtypes = {user.args[1] if user.target is _CAST else None for user in onward}
    if len(dtypes) == 1 and None not in dtypes:
        with graph.inserting_before(cast):
            rounded, (dtype,) = new, dtypes
            new = graph.call_function(_CAST, (rounded, dtype))
        new.meta["val"] = _value(rounded).to(dtype)
        back += onward
    cast.replace_all_uses_with(new)
    graph.erase_node(cast)
    for node in views:
        node.meta["val"] = _value(node).to(_value(new).dtype)
    for node in back:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    return True


def _readers(node: Node) -> Iterator[Node]:
    """What reads ``node``, itself or by way of views, and these."""
    for user in node.users:
        yield user
        if user.target in VIEWS:
            yield from _readers(user)


def _inline(graph: Graph, cast: Node, function: Callable[[Tensor], Tensor]) -> Node:
    """What ``function`` computes of the operand of ``cast``, as nodes of aten operators before it."""
    value = _value(cast.args[0])
    traced = _traced(function, value.dtype)
    (placeholder,) = traced.find_nodes(op="placeholder")
    made: dict[Any, Any] = {placeholder: cast.args[0]}
    with graph.inserting_before(cast), value.fake_mode:
        for node in (node for node in traced.nodes if node.op == "call_function"):
            new = made[node] = graph.node_copy(node, made.__getitem__)
            new.meta["val"] = node.target(*map_arg(new.args, _value), **new.kwargs)
    result: Node = made[traced.output_node().args[0]]
    return result


@functools.cache
def _traced(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Graph:
    """The aten operators of ``function``, elementwise. Once in a process: it takes longer than the rest of the pass."""
    with numerics.on_real_tensors(), FakeTensorMode():
        traced: Graph = make_fx(function, select_decomp_table())(torch.empty(8, dtype=dtype)).graph
    return traced


def _casts(node: Node, source: torch.dtype, to: torch.dtype) -> bool:
    return node.target is _CAST and node.args[1] == to and _value(node.args[0]).dtype == source


def _is_input(node: object) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"


def _value(node: object) -> Any:
    assert isinstance(node, Node)
    return node.meta["val"]
