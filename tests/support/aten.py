"""Graphs of aten operators, as they are inside Inductor, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

from fp8_compile.numerics import FP8_DTYPE

aten, prims = torch.ops.aten, torch.ops.prims


class Aten:
    """A graph as AOTAutograd leaves it, written by hand: each node knows its value, a fake tensor."""

    def __init__(self, device: str = "cuda") -> None:
        self.graph = Graph()
        self.device = device
        self.mode = FakeTensorMode()

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Made without a GPU also where it is on one."""
        with self.mode:
            return FakeTensor(self.mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device(self.device))

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.empty(*shape, dtype=dtype)
        return node

    def call(self, function: Callable[..., Any], *args: Any, val: Tensor | None = None) -> Node:
        values = torch.fx.map_arg(args, lambda node: node.meta["val"])
        node = self.graph.call_function(function, args)
        node.meta["val"] = function(*values) if val is None else val
        return node

    def quantize(self, x: Node) -> Node:
        return self.call(prims.convert_element_type.default, x, FP8_DTYPE)

    def matmul(self, values: Node, name: str) -> Node:
        """A scaled matmul of ``values`` [M, K] that asks for all strides of its operands."""
        rows, features = values.meta["val"].shape
        weight = self.input(f"{name}_weight", 32, features, dtype=FP8_DTYPE)
        scales = [self.input(f"{name}_scale_{i}", *s, dtype=torch.float32) for i, s in enumerate([(rows, 1), (1, 32)])]
        operands = (values, self.call(aten.permute.default, weight, [1, 0]), *scales, None, None, torch.bfloat16)
        node = self.call(aten._scaled_mm.default, *operands, val=self.empty(rows, 32))
        node.meta["eager_input_vals"] = torch.fx.map_arg(operands, lambda n: n.meta["val"]), {}
        return node

    def output(self, *nodes: Node) -> Graph:
        self.graph.output(nodes)
        # Placeholders come first in every graph.
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        for node in self.graph.find_nodes(op="placeholder"):
            first.prepend(node)
        self.graph.lint()
        return self.graph
