"""LoRA through diffusers and PEFT: each change of the adapters takes effect in the next result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8_compile
from tests.support.lora import FLOOR, OPTIONS, TINY, add, build, compile_blocks, quantized, run, uncompiled
from tests.support.sqnr import sqnr

pytestmark = pytest.mark.pipeline


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_change_of_adapters_shows_in_the_next_result() -> None:
    m = build("first", "second")
    m.set_adapters(["first"])
    compile_blocks(m)

    def both() -> Tensor:
        expected, out = uncompiled(m), run(m)
        assert sqnr(expected, out) > FLOOR
        return out

    unfused = both()
    m.fuse_lora(adapter_names=["first"])
    fused_first = both()
    m.unfuse_lora()
    both()
    m.set_adapters(["second"])
    second = both()
    m.fuse_lora(adapter_names=["second"])
    fused_second = both()
    m.unfuse_lora()
    m.set_adapters(["first", "second"], [0.5, 1.5])
    both()
    assert sqnr(unfused, fused_first) > 30
    assert sqnr(second, fused_second) > 30
    assert sqnr(fused_first, fused_second) < 30


@pytest.mark.parametrize("base", [TINY.build, lambda: quantized(TINY.build())], ids=["bf16", "fp8"])
def test_fusing_at_another_strength_without_a_run_in_between_is_seen(base: Callable[[], Any]) -> None:
    """Dynamo guards the name of the fused adapter but not its strength: neither the graph nor any address changes."""
    m = add(base(), "first")
    compile_blocks(m)
    m.fuse_lora()
    weak = [run(m) for _ in range(2)][1]
    m.unfuse_lora()
    m.set_adapters(["first"], [3.0])
    m.fuse_lora()
    with torch._dynamo.config.patch(error_on_recompile=True):
        strong = run(m)
    # Stronger adapters make the blocks count for more beside the residual stream, and so the error of FP8.
    assert sqnr(uncompiled(m), strong) > 27
    assert sqnr(weak, strong) < 20


def test_adapters_stay_and_their_base_layers_are_converted_under_their_own_names() -> None:
    m = build("first")
    m.compile_repeated_blocks(backend="fp8_diffusion", options={**OPTIONS, "ignored_layers": ["attn.to_out"]})
    run(m)
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert rows["transformer_blocks.0.attn.to_q"].decision == "quantized"
    assert rows["transformer_blocks.0.attn.to_out.0"].reason == "ignored_layers: attn.to_out"
    adapters = [row for path, row in rows.items() if "lora_" in path]
    assert adapters
    assert {row.reason for row in adapters} == {"low-rank adapter"}


def test_adapters_added_after_compilation() -> None:
    m: Any = TINY.build()
    compile_blocks(m)
    plain = run(m)
    add(m, "late")
    m.fuse_lora()  # before any graph with the adapter has run
    out = run(m)
    assert sqnr(uncompiled(m), out) > FLOOR
    assert sqnr(plain, out) < 30
    m.unfuse_lora()
    m.unload_lora() if hasattr(m, "unload_lora") else m.delete_adapters("late")
    assert sqnr(plain, run(m)) > 30
