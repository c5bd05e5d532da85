"""Quantized weights where Dynamo gives a frame up, and after compilations that failed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import fp8_compile
from fp8_compile.weights import quantized_weight
from tests.support.blocks import LOAD, OPTIONS, model, tokens

WIDTHS = range(64, 256, 16)  # more than Dynamo's limit of recompilations


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Chain(nn.Module):
    """Linears of as many shapes as there are widths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width + 16) for width in WIDTHS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Skipped(Chain):
    """Its frame stays in Python, and what it calls is offered to Dynamo."""

    forward = torch._dynamo.disable(Chain.forward, recursive=False)


class Guarded(Chain):
    """A context manager and a graph break in it: Dynamo gives the frame up."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
        finally:
            x = x * 1
        return x


@pytest.mark.parametrize("kind", [Skipped, Guarded])
def test_frames_that_dynamo_skips_make_no_more_graphs_than_those_of_a_plain_model(kind: Callable[[], Chain]) -> None:
    def graphs(m: nn.Module) -> tuple[int, int]:
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(m, backend="aot_eager")
        for _ in range(2):
            compiled(torch.randn(32, WIDTHS[0], dtype=torch.bfloat16))
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    plain, converted = kind().bfloat16(), kind().bfloat16()
    fp8_compile.quantize_(converted, {"min_features": WIDTHS[0]})
    assert graphs(converted) == graphs(plain)
    assert converted.to("cpu") is converted


def misspelt() -> nn.Module:
    m = model(2)
    fp8_compile.quantize_(m, LOAD)
    compiled = torch.compile(m, backend="fp8_diffusion", options={**OPTIONS, "ignored_layers": ["to_qq"]})
    with pytest.raises(BackendCompilerFailed, match="to_qq"):
        compiled(tokens())
    return m


def broken_graph() -> nn.Module:
    """Dynamo fails before any backend is called."""
    m = model(2)
    fp8_compile.quantize_(m, LOAD)

    def f(x: Tensor) -> Tensor:
        x = m.blocks[0](x)
        torch._dynamo.graph_break()
        return m.blocks[1](x)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(f, backend="aot_eager", fullgraph=True)(tokens())
    return m


@pytest.mark.parametrize("fail", [misspelt, broken_graph])
@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.to(torch.float16), lambda m: m.to("meta")], ids=["cpu", "fp16", "meta"]
)
def test_a_model_can_be_moved_after_a_compilation_failed(
    fail: Callable[[], nn.Module], move: Callable[[nn.Module], nn.Module]
) -> None:
    m = fail()
    assert move(m) is m


def test_references_that_live_on_do_not_cost_a_collection_each(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(3)
    fp8_compile.quantize_(m, LOAD)
    held = [weakref.ref(p) for p in m.parameters()]
    now, collected = [0.0], []

    def collect() -> None:
        collected.append(now[0])
        now[0] += 1

    monkeypatch.setattr(quantized_weight, "gc", SimpleNamespace(collect=collect))
    monkeypatch.setattr(quantized_weight, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(quantized_weight, "_collect_after", 0.0)
    for now[0] in (0.0, 5.0, 20.0):
        m.state_dict()
    assert len(held) > 12
    assert collected == [0.0, 20.0]
