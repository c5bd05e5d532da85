"""diffusers' step caches together with the backend: right results, and work really skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import hooks
from diffusers.hooks import TaylorSeerCacheConfig
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

import fp8_compile
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS

pytestmark = pytest.mark.pipeline

TINY = MODELS["Flux"]
STEPS, BLOCKS = 6, 5
_timestep = [0]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    # A cache's state is Python's: Dynamo makes a graph for each of its states.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        yield


class Attentions:
    """An inner backend that counts the attentions which compiled graphs carry out."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        inside = sum("scaled_dot_product_attention" in str(node.target) for node in gm.graph.nodes)
        compiled = aot_eager(gm, inputs)

        def run(*args: Any) -> Any:
            self.count += inside
            return compiled(*args)

        return run


def first_block() -> Any:
    return hooks.FirstBlockCacheConfig(threshold=0.5)


def taylor_seer() -> Any:
    return TaylorSeerCacheConfig(cache_interval=2, max_order=1, disable_cache_before_step=2, use_lite_mode=True)


def pyramid_attention_broadcast() -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: _timestep[0],
    )


def sea() -> Any:
    def latents(m: Any, args: Any, kwargs: Any) -> list[Tensor]:
        return [kwargs["hidden_states"][0].reshape(6, 8, 1, 64).permute(3, 2, 0, 1)]

    return hooks.SeaCacheConfig(threshold=10.0, raw_vision_callback=latents)


def mag() -> Any:
    return hooks.MagCacheConfig(
        threshold=0.5, max_skip_steps=2, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)
    )


def denoise(m: Any) -> Tensor:
    inputs, outputs = TINY.inputs(0), []
    for step in range(STEPS):
        _timestep[0] = 900 - 10 * step
        inputs["timestep"] = torch.tensor([0.9 - 0.1 * step], dtype=torch.bfloat16)
        with m.cache_context("cond"):
            outputs.append(TINY.output(m(**{**inputs, "hidden_states": inputs["hidden_states"] * (1 - 0.1 * step)})))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("config", "fullgraph"),
    [
        (first_block, False),
        (taylor_seer, False),
        pytest.param(pyramid_attention_broadcast, True, marks=pytest.mark.slow),
        (sea, False),
        (mag, False),
    ],
)
def test_right_results_and_skipped_work(config: Callable[[], Any], fullgraph: bool) -> None:
    cached = TINY.build()
    cached.enable_cache(config())  # type: ignore[operator]
    expected = denoise(cached)
    m: Any = TINY.build()
    fp8_compile.quantize_(m, {"min_features": 64})
    m.enable_cache(config())
    counter = Attentions()
    m.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=fullgraph, options={"inner_backend": counter})
    assert sqnr(expected, denoise(m)) > 26
    assert counter.count < STEPS * BLOCKS
    # MagCache's hooks keep Dynamo out of the blocks altogether, with any backend: FP8 weights are dequantized there.
    assert (counter.count == 0) == (config is mag)


@pytest.mark.parametrize("config", [first_block, taylor_seer, sea, mag])
def test_what_stock_torch_compile_cannot_do_either(config: Callable[[], Any]) -> None:
    m: Any = TINY.build()
    m.enable_cache(config())
    m.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        denoise(m)
