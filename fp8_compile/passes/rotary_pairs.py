"""Compute rotary position embeddings that are written in real numbers without taking the pairs apart.

FLUX rotates the pairs (a, b) of a head by ``x * cos + rotated * sin``, with the pairs (-b, a) stacked anew; Wan writes
both halves of the result into an empty tensor. Inductor loads and computes both halves for every element then, and
chooses one. Read backwards by ``flip``, as in `fp8_compile.passes.real_rotary`, the crossed pairs are index arithmetic.

FLUX's double blocks also concatenate text and image before they rotate. The concatenation is stored, and the rotation
reads it again. Rotated first, each part goes through memory once, from its normalization to its place in the result.

Before, FLUX::

    (1) x = cat([text, image], dim=1)                   bfloat16 [B, S, H, D]
    (2) a, b = reshape(x, B, S, H, -1, 2).unbind(-1)
    (3) r = stack([-b, a], dim=-1).flatten(3)
    (4) y = (x.float() * cos + r.float() * sin).to(bfloat16)        cos, sin: float32 [1, S, 1, D]

After::

    (1) y_text = rotated(text, cos[:, :T], sin[:, :T]);  y_image = rotated(image, cos[:, T:], sin[:, T:])
    (2) y = cat([y_text, y_image], dim=1)

    rotated(x, cos, sin):  p = unflatten(x.float(), -1, (-1, 2))
                           (p * cos + flip(p, -1) * (sin * sign)).flatten(-2).to(bfloat16)      sign: [-1, 1]

Before, Wan::

    (1) a, b = unflatten(x, -1, (-1, 2)).unbind(-1)
    (2) c = cos[..., 0::2];  s = sin[..., 1::2]
    (3) out = empty_like(x)
    (4) out[..., 0::2] = a * c - b * s
    (5) out[..., 1::2] = a * s + b * c

After::

    (1) out = rotated(x, c, s)

The products and sums are the same, so results are equal to the bit but for what a compiler contracts.

It leaves alone what is not contiguous, since later nodes may rely on strides; parts of a rotation that others read; and
what is written into meanwhile.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .context import Context
from .graphs import call, example, is_call, storages, written_storages
from .real_rotary import signs

_EVEN, _ODD = ((Ellipsis, slice(start, None, 2)) for start in range(2))


def rotary_pairs(graph: Graph, context: Context) -> int:
    """Rewrite ``graph``, a copy of Dynamo's, in place; counts the rotations."""
    rotations = 0
    for node in list(graph.nodes):
        found = _stacked(node) or _assigned(node)
        if found is not None and _is_sound(found):
            _rewrite(found)
            rotations += 1
    return rotations


@dataclass(frozen=True)
class _Rotation:
    """A rotation, found in a graph.

    Attributes:
        x: ``[..., D]``.
        cos, sin: ``[..., D]`` or, one for each pair, ``[..., D / 2]``; they broadcast to ``x`` in the other dimensions.
        nodes: which it consists of, in the order of the graph.
        result: the one that others read.
        dtype: to which the result is cast; None if it is not.
        widened: whether ``x`` is cast to float32 first.
    """

    x: Node
    cos: Node
    sin: Node
    nodes: list[Node]
    result: Node
    dtype: torch.dtype | None
    widened: bool = False

    @property
    def concatenation(self) -> Node | None:
        """What makes ``x``, if that is a concatenation that can as well be made of results."""
        x, whole = self.x, example(self.x)
        if self.dtype is None or not is_call(x, torch.cat, "cat") or not x.args or set(x.kwargs) - {"dim"}:
            return None
        if not set(x.users) <= set(self.nodes) or x in (self.cos, self.sin):
            return None
        parts, dim = _parts(x)
        values, tables = [example(part) for part in parts], [example(table) for table in (self.cos, self.sin)]
        # A part of an earlier rotation that was rewritten has no value.
        tensors = all(isinstance(value, Tensor) for value in values)
        same = tensors and all(value.dim() == whole.dim() and value.dtype == whole.dtype for value in values)
        # What broadcasts stays whole; what does not is cut as the parts are.
        fitting = all(
            statically_known_true(size == 1) or statically_known_true(size == whole.shape[dim])
            for size in (table.shape[dim] for table in tables)
        )
        return x if same and fitting and dim < whole.dim() - 1 else None


def _stacked(total: Any) -> _Rotation | None:
    """FLUX's, which ends in the sum ``total``, or in its cast if nothing else reads the sum."""
    straight, crossed = _binary(total, operator.add, "add")
    (x, cos), (rotated, sin) = _binary(straight, operator.mul, "mul"), _binary(crossed, operator.mul, "mul")
    casts = [node for node in (x, rotated) if _is(node, None, "float")]
    if len(casts) == 2:
        x, rotated = (node.args[0] for node in casts)
    else:
        casts = []  # of ``x`` alone: it was cast before it was taken apart
    stack: Any = rotated.args[0] if _is(rotated, torch.flatten, "flatten") and rotated.args else None
    if not _is(stack, torch.stack, "stack") or not stack.args or stack.kwargs != {"dim": -1}:
        return None
    if len(stack.args[0]) != 2:
        return None
    negated, a = stack.args[0]
    b = negated.args[0] if _is(negated, operator.neg, "neg") and negated.args else None
    of_x = _halved(a, b)
    if of_x is None or of_x[0] is not x or example(rotated).shape != example(x).shape:
        return None
    nodes = [*of_x[1:], a, b, negated, stack, rotated, *casts, straight, crossed, total]
    result, dtype = total, None
    if len(total.users) == 1 and _is_cast(reader := next(iter(total.users))) and reader.args[0] is total:
        result, dtype = reader, example(reader).dtype
        nodes.append(reader)
    return _Rotation(x, cos, sin, sorted(nodes), result, dtype, widened=len(casts) == 2)


def _assigned(last: Any) -> _Rotation | None:
    """Wan's, which ends in the second assignment, ``last``, to the halves of an empty tensor."""
    out: Any = last.args[0] if _is(last, operator.setitem, "") and last.args[1] == _ODD else None
    if not _is(out, torch.empty_like, "empty_like") or len(out.args) != 1 or out.kwargs:
        return None
    first: Any = min(out.users)
    if not _is(first, operator.setitem, "") or first.args[1] != _EVEN or any(first < n < last for n in out.users):
        return None
    even, odd = first.args[2], last.args[2]
    products = [*_binary(even, operator.sub, "sub"), *_binary(odd, operator.add, "add")]
    (a, cos), (b, sin), *others = (_binary(product, operator.mul, "mul") for product in products)
    of_x = _halved(a, b)
    if of_x is None or out.args[0] is not of_x[0] or others != [(a, sin), (b, cos)]:
        return None
    nodes = [*of_x[1:], a, b, out, *products, even, first, odd, last]
    return _Rotation(of_x[0], cos, sin, sorted(nodes), out, example(out).dtype)


def _is(node: Any, function: Any, method: str) -> bool:
    return isinstance(node, Node) and is_call(node, function, method)


def _is_cast(node: Any) -> bool:
    to = _is(node, None, "to") and len(node.args) == 2 and isinstance(node.args[1], torch.dtype) and not node.kwargs
    return to or (_is(node, None, "type_as") and len(node.args) == 2)


def _binary(node: Any, function: Any, method: str) -> Any:
    """The two operands of ``node`` if it is this call, else two of None."""
    return node.args if _is(node, function, method) and len(node.args) == 2 and not node.kwargs else (None, None)


def _halved(a: Any, b: Any) -> tuple[Node, Node, Node] | None:
    """``x``, ``pairs`` and ``unbind`` of ``a, b = (pairs := x.unflatten(-1, (-1, 2))).unbind(-1)``."""
    unbind, first = _binary(a, operator.getitem, "")
    if first != 0 or _binary(b, operator.getitem, "") != (unbind, 1):
        return None
    pairs, dim = _binary(unbind, torch.unbind, "unbind")
    if dim != -1 or not (_is(pairs, torch.reshape, "reshape") or _is(pairs, torch.unflatten, "unflatten")):
        return None
    if not pairs.args:
        return None
    x, shape = pairs.args[0], example(pairs).shape
    return (x, pairs, unbind) if shape[:-2] == example(x).shape[:-1] and shape[-1] == 2 else None


def _parts(concatenation: Node) -> tuple[list[Node], int]:
    parts: Any = concatenation.args[0]
    dim: Any = concatenation.args[1] if len(concatenation.args) > 1 else concatenation.kwargs.get("dim", 0)
    return list(parts), dim % example(concatenation).dim()


def _is_sound(found: _Rotation) -> bool:
    """Whether shapes and layouts are as expected, and nothing else reads what lies between or writes what is read."""
    operands = (found.x, found.cos, found.sin)
    if not all(isinstance(node, Node) and node not in found.nodes for node in operands):
        return False
    x, cos, sin, result = (example(node) for node in (*operands, found.result))
    if not all(isinstance(value, Tensor) and value.dim() == x.dim() for value in (x, cos, sin, result)):
        return False
    if cos.shape[-1] != sin.shape[-1] or cos.shape[-1] not in (x.shape[-1], x.shape[-1] // 2):
        return False
    if not (x.is_floating_point() and x.is_contiguous() and result.is_contiguous()):
        return False
    inside = set(found.nodes)
    if any(not set(node.users) <= inside for node in inside if node is not found.result):
        return False
    start, read = found.nodes[0], storages(operands)
    if concatenation := found.concatenation:
        start, read = concatenation, read | storages(concatenation.args)
    while start is not found.nodes[-1]:
        if start not in inside and written_storages(start) & read:
            return False
        start = start.next
    return True


def _rewrite(found: _Rotation) -> None:
    """Put the rotation of whole pairs in the place of ``found``."""
    last, concatenation = found.nodes[-1], found.concatenation
    with last.graph.inserting_before(last):
        if concatenation is None:
            new = _rotated(found, found.x, found.cos, found.sin)
        else:
            parts, dim = _parts(concatenation)
            rotated: list[Node] = []
            start: Any = 0
            for part in parts:
                length: Any = example(part).shape[dim]
                if not isinstance(length, int):
                    length = call(last, "size", part, dim)
                tables = (
                    table if example(table).shape[dim] == 1 else call(last, torch.narrow, table, dim, start, length)
                    for table in (found.cos, found.sin)
                )
                rotated.append(_rotated(found, part, *tables))
                known = isinstance(start, int) and isinstance(length, int)
                start = start + length if known else call(last, operator.add, start, length)
            new = call(last, torch.cat, rotated, dim=dim)
    new.meta["example_value"] = example(found.result)
    found.result.replace_all_uses_with(new)
    for node in reversed(found.nodes):
        node.graph.erase_node(node)
    if concatenation is not None:
        concatenation.graph.erase_node(concatenation)


def _rotated(found: _Rotation, x: Node, cos: Node, sin: Node) -> Node:
    origin = found.nodes[-1]
    if found.widened:
        x = call(origin, "float", x)
    pairs = call(origin, torch.unflatten, x, -1, (-1, 2))
    of_pairs = example(found.cos).shape[-1] < example(found.x).shape[-1]
    for_each = (torch.unsqueeze, -1) if of_pairs else (torch.unflatten, -1, (-1, 2))
    cos, sin = (call(origin, for_each[0], table, *for_each[1:]) for table in (cos, sin))
    sign = signs(origin, example(found.x).device)
    flipped = call(origin, torch.flip, pairs, (-1,))
    crossed = call(origin, operator.mul, flipped, call(origin, operator.mul, sin, sign))
    total = call(origin, operator.add, call(origin, operator.mul, pairs, cos), crossed)
    flat = call(origin, torch.flatten, total, -2)
    return flat if found.dtype is None else call(origin, "to", flat, found.dtype)
