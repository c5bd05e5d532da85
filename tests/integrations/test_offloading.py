"""Offloading of FP8 weights: what moves them leaves right results. On the CPU the two ends are one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import fp8_compile
from fp8_compile import QuantizedWeight
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

pytestmark = pytest.mark.pipeline

TINY = MODELS["QwenImage"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        yield


def build() -> Any:
    m = TINY.build()
    fp8_compile.quantize_(m, {"min_features": 64, "ignored_layers": ["img_mlp"]})
    return m


def run(m: nn.Module) -> Tensor:
    return TINY.output(m(**TINY.inputs(0)))


def compile_blocks(m: Any) -> None:
    # Not fullgraph: the hooks of diffusers and accelerate are no part of a graph, with any backend.
    m.compile_repeated_blocks(backend="fp8_diffusion", options={"inner_backend": "aot_eager"})


def sequentially(m: Any) -> None:
    accelerate.cpu_offload(m, execution_device=CPU, offload_buffers=True)
    assert m.transformer_blocks[0].attn.to_q.weight.device.type == "meta"


def as_a_whole(m: Any) -> None:
    accelerate.cpu_offload_with_hook(m, execution_device=CPU)


def by_leaves(m: Any) -> None:
    m.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def by_blocks(m: Any) -> None:
    m.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [sequentially, as_a_whole, by_leaves, by_blocks])
def test_eager(offload: Callable[[Any], None]) -> None:
    m = build()
    expected = run(m)
    offload(m)
    for _ in range(2):
        assert torch.equal(run(m), expected)
    assert sum(isinstance(p, QuantizedWeight) for p in m.parameters()) == 41


@pytest.mark.parametrize("offload", [sequentially, as_a_whole, by_leaves, by_blocks])
@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled(offload: Callable[[Any], None], before: bool) -> None:
    """Whether a block has run before it is offloaded or is compiled while it is."""
    m = build()
    compile_blocks(m)
    expected = run(m)
    if not before:
        torch.compiler.reset()
    offload(m)
    for _ in range(3):
        assert torch.equal(run(m), expected)
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert (rows["transformer_blocks.1.attn.to_q"].decision, rows["transformer_blocks.1.attn.to_q"].reason) == (
        "quantized",
        "",
    )


@pytest.mark.parametrize("name", ["QwenImage", "Flux"])
def test_group_offloading_by_blocks_of_a_model_compiled_whole(name: str) -> None:
    """The hooks break the graph, and Dynamo gives frames up around them."""
    tiny = MODELS[name]
    m: Any = tiny.build()
    fp8_compile.quantize_(m, {"min_features": 64})
    expected = tiny.output(m(**tiny.inputs(0)))
    by_blocks(m)
    m.compile(backend="fp8_diffusion", options={"inner_backend": "aot_eager"})
    for _ in range(3):
        assert sqnr(expected, tiny.output(m(**tiny.inputs(0)))) > 40


def test_bytes_that_are_new_at_each_call_are_read_and_cost_one_collection_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where offloading really moves them; the hooks above, on one device, leave them where they are."""
    m = build()
    compile_blocks(m)
    collected: list[int] = []
    monkeypatch.setattr("fp8_compile.runtime.binder.gc", SimpleNamespace(collect=lambda: collected.append(1)))
    expected = run(m)
    for _ in range(3):
        for p in m.parameters():
            if isinstance(p, QuantizedWeight):
                p.data = p.detach().clone()
        assert torch.equal(run(m), expected)
    assert len(collected) == 1


def test_what_is_not_tied_is_not_taken_for_tied() -> None:
    """accelerate tells tied weights by their addresses, and a wrapper subclass has none of its own."""
    m = build()
    addresses = [p.data_ptr() for p in m.parameters()]
    assert len(set(addresses)) == len(addresses)
