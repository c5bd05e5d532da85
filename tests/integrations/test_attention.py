"""Attention in FP8 in real models of diffusers: whole and block by block, LoRA, quantized weights, step caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fp8_compile
from tests.support.lora import OPTIONS, TINY, add, quantized, run
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS, Tiny

pytestmark = pytest.mark.pipeline

FP8 = {**OPTIONS, "attention": "fp8-emulated"}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def decisions(m: nn.Module) -> dict[str, str]:
    return {row.path: row.decision for row in fp8_compile.report(m).attentions}


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("QwenImage", {"transformer_blocks.*.attn.sdpa"}),
        slow("Flux", {"transformer_blocks.*.attn.sdpa", "single_transformer_blocks.*.attn.sdpa"}),
        slow("Wan", {"blocks.*.attn1.sdpa", "blocks.*.attn2.sdpa"}),
        slow(
            "ZImage", {"layers.*.attention.sdpa", "noise_refiner.*.attention.sdpa", "context_refiner.*.attention.sdpa"}
        ),
    ],
)
def test_models_whole_and_block_by_block(name: str, paths: set[str]) -> None:
    model: Tiny = MODELS[name]
    found: list[Any] = []
    for whole in (True, False):
        m: Any = model.build()
        written = model.output(m(**model.inputs(0)))
        if whole:
            m.compile(backend="fp8_diffusion", options=FP8)
        else:
            m.compile_repeated_blocks(backend="fp8_diffusion", options=FP8)
        out = model.output(m(**model.inputs(0)))
        assert 15 < sqnr(written, out) < 60
        found.append(decisions(m))
    assert found[0] == found[1]
    assert {".".join("*" if part.isdigit() else part for part in path.split(".")) for path in found[0]} == paths


@pytest.mark.slow
def test_the_first_block_alone_stays() -> None:
    m: Any = TINY.build()
    plain: Any = TINY.build()
    m.compile_repeated_blocks(
        backend="fp8_diffusion", options={**FP8, "ignored_layers": ["transformer_blocks.0.attn.sdpa"]}
    )
    plain.compile_repeated_blocks(backend="fp8_diffusion", options=FP8)
    assert sqnr(run(plain), run(m)) < 60
    first, *others = decisions(m).values()
    assert (first, set(others)) == ("as-written", {"fp8"})


@pytest.mark.parametrize("order", ["not quantized", slow("adapters, then quantized"), slow("quantized, then adapters")])
def test_lora_on_the_queries(order: str) -> None:
    m: Any = TINY.build()
    if order == "quantized, then adapters":
        m = add(quantized(m), "first")
    elif order == "not quantized":
        m = add(m, "first")
    else:
        m = quantized(add(m, "first"))
    written = run(m)
    options = {**FP8, "ignored_layers": ["transformer_blocks.0.attn.sdpa"]}
    m.compile_repeated_blocks(backend="fp8_diffusion", options=options)
    assert sqnr(written, run(m)) > 20
    first, *others = decisions(m).values()
    assert (first, set(others)) == ("as-written", {"fp8"})
    m.disable_adapters()
    assert sqnr(written, run(m)) < 20
    m.enable_adapters()
    m.fuse_lora()
    assert sqnr(written, run(m)) > 20
    assert decisions(m)["transformer_blocks.0.attn.sdpa"] == "as-written"


@pytest.mark.slow
def test_with_a_step_cache() -> None:
    """The cache leaves out blocks, and what runs is in FP8."""
    from diffusers import hooks

    model = MODELS["Flux"]
    m: Any = model.build()
    written = model.output(m(**model.inputs(0)))
    m.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.5))
    m.compile_repeated_blocks(backend="fp8_diffusion", options=FP8)
    with m.cache_context("cond"), torch._dynamo.config.patch(recompile_limit=64):
        for _ in range(2):
            assert 15 < sqnr(written, model.output(m(**model.inputs(0)))) < 60
    assert set(decisions(m).values()) == {"fp8"}
