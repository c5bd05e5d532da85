"""What the tests of the passes share: Dynamo's graph of a small module, and a graph printed to be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fp8_compile.checks import parse_options
from fp8_compile.passes.context import Constants, Context, Plan
from fp8_compile.passes.graphs import copy_graph
from fp8_compile.passes.pipeline import rewrite
from fp8_compile.passes.plan import plan_linears
from fp8_compile.runtime.constants import _make


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Always the same values for one shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


class Call(nn.Module):
    """A module whose forward is ``function(module, x, *more)``, with bfloat16 parameters of the given shapes."""

    def __init__(self, function: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(rand(*shape), requires_grad=False))

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.function(self, x, *more)


@dataclass
class Captured:
    """Dynamo's graph and the inputs that it was captured with, parameters included."""

    gm: GraphModule
    inputs: list[Any]

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    def value(self, node: Node) -> Any:
        """The input that belongs to the placeholder ``node``."""
        return self.inputs[self.graph.find_nodes(op="placeholder").index(node)]


def capture(model: Callable[..., Any], *args: Any, dynamic: bool | None = False) -> Captured:
    """The one graph that Dynamo makes of ``model(*args)``."""
    graphs: list[Captured] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Captured(gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (captured,) = graphs
    return captured


# For passes that ask nothing of it.
CONTEXT = Context(GraphModule(nn.Module(), Graph()), parse_options({}))


def context(captured: Captured | GraphModule, refusal: Any = None, **options: Any) -> Context:
    """What the passes share under ``options``, which by default refuse no layer for its size."""
    opts = parse_options({"min_features": 1, "min_m": 1, **options})
    gm = captured.gm if isinstance(captured, Captured) else captured
    return Context(gm, opts, refusal)


def plan(captured: Captured | GraphModule, refusal: Any = None, **options: Any) -> Plan:
    """The plan under ``options``."""
    made = context(captured, refusal, **options)
    matches = plan_linears(copy_graph(made.module), made)
    assert matches == len(made.plan.quantized)
    return made.plan


def rewritten(captured: Captured | GraphModule, **options: Any) -> tuple[GraphModule, list[Constants]]:
    """The graph after the passes on Dynamo's graph, and its constants."""
    made = context(captured, **options)
    return rewrite(made, lambda stage, make: None), made.constants


def run(captured: Captured, gm: GraphModule, constants: list[Constants]) -> Any:
    """Execute the rewritten graph on the captured inputs, with the constants of their weights."""
    given = dict(zip((n.name for n in captured.graph.find_nodes(op="placeholder")), captured.inputs, strict=True))
    made = {
        name: tensor
        for c in constants
        for name, tensor in zip(c.placeholders, _make(c.scheme, given[c.weight], c.transposed), strict=True)
    }
    with torch.no_grad():
        return gm(*({**given, **made}[n.name] for n in gm.graph.find_nodes(op="placeholder")))


def show(graph: Graph) -> str:
    """The graph, a node per line: ``name: type`` for an input, ``name = function(arguments)`` for a call.

    Inputs bear the names that they have in the model's source, ``self.to_q.weight``; the others their node's.
    """

    def text(value: object) -> str:
        if isinstance(value, Node):
            return name(value)
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(text, value))}{',' * (len(value) == 1)})"
        return str(value)

    def name(node: Node) -> str:
        source = getattr(node, "_dynamo_source", None)
        if node.op != "placeholder" or source is None:
            return node.name
        parts = re.findall(r"\w+", source.name.removeprefix("L"))
        return ".".join(p for p in parts if p not in ("_modules", "_parameters", "_buffers"))

    lines = []
    for node in graph.nodes:
        arguments = ", ".join([*map(text, node.args), *(f"{key}={text(value)}" for key, value in node.kwargs.items())])
        if node.op == "placeholder":
            value = node.meta.get("example_value", node.meta.get("val"))
            lines.append(f"{name(node)}: {str(value.dtype).removeprefix('torch.')}{list(value.shape)}")
        elif node.op == "output":
            lines.append(f"return {arguments}")
        else:
            target = node.target if isinstance(node.target, str) else node.target.__name__
            lines.append(f"{node.name} = {'.' * (node.op == 'call_method')}{target}({arguments})")
    return "\n".join(lines)


def calls(graph: Graph, function: Callable[..., Any]) -> list[Node]:
    """The nodes that call ``function``, in order."""
    return list(graph.find_nodes(op="call_function", target=function))
