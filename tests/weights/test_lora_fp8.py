"""LoRA on FP8 base weights: each change of the adapters takes effect in the next result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from fp8_compile import QuantizedWeight
from tests.support.lora import FLOOR, TINY, add, compile_blocks, quantized, run, uncompiled
from tests.support.sqnr import sqnr

pytestmark = pytest.mark.pipeline


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def base(m: nn.Module) -> list[Tensor]:
    return [p.dequantize() for p in m.parameters() if isinstance(p, QuantizedWeight)]


@pytest.mark.parametrize("first", ["adapters", "fp8"])
def test_every_change_of_adapters_shows_in_the_next_result(first: str) -> None:
    m: Any = (
        add(quantized(TINY.build()), "first", "second")
        if first == "fp8"
        else quantized(add(TINY.build(), "first", "second"))
    )
    assert len(base(m)) == 47
    assert not any(isinstance(p, QuantizedWeight) for path, p in m.named_parameters() if "lora_" in path)
    compile_blocks(m)

    def both() -> Tensor:
        expected, out = uncompiled(m), run(m)
        assert sqnr(expected, out) > FLOOR
        return out

    m.set_adapters(["first"])
    unfused, before = both(), base(m)
    m.fuse_lora(adapter_names=["first"])
    assert sqnr(unfused, both()) > 30
    fused = base(m)
    assert sum(not torch.equal(a, b) for a, b in zip(before, fused, strict=True)) == 12
    m.unfuse_lora()
    assert torch.equal(unfused, both())
    assert all(torch.equal(a, b) for a, b in zip(before, base(m), strict=True))
    m.set_adapters(["second"])
    second = both()
    assert sqnr(unfused, second) < 30
    m.set_adapters(["first", "second"], [0.5, 1.5])
    mixed = both()
    assert sqnr(second, mixed) < 30
    m.set_adapters(["first", "second"], [0.0, 0.0])
    m.disable_lora()
    plain = both()
    assert sqnr(plain, mixed) < 30
    m.enable_lora()
    m.delete_adapters(["first", "second"])
    assert sqnr(plain, both()) > 40


def test_what_was_written_into_a_merged_weight_is_not_undone() -> None:
    m = add(quantized(TINY.build()), "first")
    compile_blocks(m)
    run(m)
    layer = m.transformer_blocks[1].attn.to_q
    m.fuse_lora()
    layer.base_layer.weight.mul_(-1)
    expected = layer.base_layer.weight.dequantize() - layer.get_delta_weight("first")
    m.unfuse_lora()
    assert sqnr(expected, layer.base_layer.weight.dequantize()) > 28
    assert "_fp8_before_merge" not in vars(layer)


def test_an_adapter_can_be_swapped_for_another_without_a_recompile() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        m: Any = add(TINY.build(), "default_0")
        torch.manual_seed(seed)
        for path, p in m.named_parameters():
            if "lora_B" in path:
                p.normal_(std=1.0)
        return {k: v.bfloat16() for k, v in get_peft_model_state_dict(m, adapter_name="default_0").items()}

    m = quantized(TINY.build())
    m.enable_lora_hotswap(target_rank=16)
    m.load_lora_adapter({f"transformer.{k}": v for k, v in state(1).items()}, adapter_name="default_0")
    compile_blocks(m)
    first = [run(m) for _ in range(2)][1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        m.load_lora_adapter(
            {f"transformer.{k}": v for k, v in state(2).items()}, adapter_name="default_0", hotswap=True
        )
        second = run(m)
    assert sqnr(uncompiled(m), second) > FLOOR
    assert sqnr(first, second) < 30
