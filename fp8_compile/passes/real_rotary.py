"""Compute rotary position embeddings in real arithmetic.

Qwen-Image, Z-Image and others rotate queries and keys by a complex multiplication. Inductor generates no code for
complex numbers: each rotation becomes an eager kernel, and the activation goes through memory in float32 before and
after it. In real arithmetic the rotation fuses with the normalization before it and the concatenation after it. A pair
(a, b) times c + is is (ac - bs, bc + as), which is what the complex kernel computes too: results agree to rounding.

Before::

    (1) z = view_as_complex(x)            x: float32 [..., D / 2, 2]
    (2) f = unsqueeze(freqs, 1)           freqs: complex64
    (3) p = mul(z, f)
    (4) y = view_as_real(p)

After::

    (1) r = unsqueeze(view_as_real(freqs), 1)
    (2) cos = r[..., 0:1];  sin = r[..., 1:2]
    (3) y = x * cos + flip(x, -1) * (sin * sign)      sign: [-1, 1]

``flip`` and ``sign``, made of an ``arange``, are index arithmetic in the generated kernel; the more obvious ``stack``
of the two halves would compute both for every element and discard one.

It leaves alone a product with a real tensor or a number, one that anything but one ``view_as_real`` reads, and what is
not contiguous before or after, since later nodes may rely on strides.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .context import Context
from .graphs import call, example, is_call, storages, written_storages

_MULTIPLICATIONS = ((operator.mul, "__mul__"), (torch.mul, "mul"))


def real_rotary(graph: Graph, context: Context) -> int:
    """Rewrite ``graph``, a copy of Dynamo's, in place; counts the rotations."""
    rotations = 0
    tables: dict[Node, tuple[Node, Node]] = {}
    for product in list(graph.nodes):
        if written := written_storages(product):
            for stale in [freqs for freqs in tables if written & storages(freqs)]:
                del tables[stale]
        operands = _rotation(product)
        if operands is None:
            continue
        result, z, freqs = operands
        x = z.args[0]
        with graph.inserting_before(product):
            if freqs not in tables:
                tables[freqs] = _table(product, freqs)
            cos, signed_sin = tables[freqs]
            crossed = call(product, operator.mul, call(product, torch.flip, x, (-1,)), signed_sin)
            rotated = call(product, operator.add, call(product, operator.mul, x, cos), crossed)
        rotated.meta["example_value"] = example(result)
        result.replace_all_uses_with(rotated)
        for old in (result, product, z):
            if not old.users:
                graph.erase_node(old)
        _erase_unused(freqs)
        rotations += 1
    return rotations


def _rotation(product: Node) -> tuple[Node, Node, Node] | None:
    """The real view, the complex view of the activation and the factors of ``product``, if it is a rotation."""
    if not any(is_call(product, *way) for way in _MULTIPLICATIONS) or len(product.args) != 2 or product.kwargs:
        return None
    result = next(iter(product.users), None)
    if result is None or len(product.users) > 1 or not is_call(result, torch.view_as_real, ""):
        return None
    for z, freqs in (product.args, product.args[::-1]):
        if isinstance(z, Node) and isinstance(freqs, Node) and is_call(z, torch.view_as_complex, "") and z.args:
            laid_out = _is_contiguous(result) and _is_contiguous(z.args[0])
            return (result, z, freqs) if laid_out and _are_factors(freqs, z) else None
    return None


def _are_factors(freqs: Node, z: Node) -> bool:
    value, values = example(freqs), example(z)
    # A number in a tensor would be promoted otherwise once it has a dimension, and may lie on another device.
    return isinstance(value, Tensor) and value.is_complex() and value.dim() > 0 and value.device == values.device


def _is_contiguous(node: Any) -> bool:
    value = example(node) if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.is_contiguous()


def _table(product: Node, freqs: Node) -> tuple[Node, Node]:
    """The cosines, and the sines with the sign that each half of a pair needs; both broadcast over pairs."""
    origin, dims = freqs, []
    while source := _unsqueezed(origin):
        dim: Any = origin.args[1] if len(origin.args) > 1 else origin.kwargs["dim"]
        dims.append(dim % example(origin).dim())
        origin = source

    # A conjugated tensor has no real view.
    real = call(product, torch.view_as_real, call(product, torch.resolve_conj, origin))
    for dim in reversed(dims):
        real = call(product, torch.unsqueeze, real, dim)
    cos, sin = (call(product, operator.getitem, real, (..., slice(half, half + 1))) for half in range(2))
    return cos, call(product, operator.mul, sin, signs(product, example(freqs).device))


def signs(origin: Node, device: torch.device) -> Node:
    """``[-1, 1]``, which the sines of the two halves of a pair are multiplied by; index arithmetic in a kernel."""
    half = call(origin, torch.arange, 2, device=device)
    return call(origin, operator.sub, call(origin, operator.mul, half, 2), 1)


def _unsqueezed(node: Node) -> Node | None:
    source = node.args[0] if is_call(node, torch.unsqueeze, "unsqueeze") and node.args else None
    return source if isinstance(source, Node) else None


def _erase_unused(freqs: Node) -> None:
    while not freqs.users and (source := _unsqueezed(freqs)):
        freqs.graph.erase_node(freqs)
        freqs = source
