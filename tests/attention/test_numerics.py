"""What attention in FP8 loses: floors against float64, and what smoothing the keys changes."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fp8_compile.attention import emulated
from fp8_compile.attention.flex import attention_flex
from fp8_compile.attention.operands import Operands, quantize
from fp8_compile.numerics import FP8_DTYPE, FP8_MAX
from tests.support.sqnr import sqnr

Three = tuple[Tensor, Tensor, Tensor]


def gaussian(heads: int = 4, key_heads: int = 4, tokens: int = 1024, size: int = 128) -> Three:
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, tokens, size, generator=made).bfloat16() for h in (heads, key_heads, key_heads))
    return q, k, v


def with_outliers() -> Three:
    """Keys whose channels differ in their mean, a tenth of them by 20 times the rest, and four large ones of values."""
    q, k, v = gaussian()
    made = torch.Generator().manual_seed(1)
    shift = torch.randn(1, 4, 1, 128, generator=made) * (torch.rand(1, 4, 1, 128, generator=made) < 0.1)
    v[..., :4] *= 16
    return q, (k + 20 * shift).bfloat16(), v


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(shared, 1), v.double().repeat_interleave(shared, 1)
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


def loss(given: Three, smooth: bool = True) -> float:
    q, k, v = given
    out = emulated.attend(quantize(q, k, v, smooth=smooth), 1 / math.sqrt(q.shape[-1]))
    assert out.dtype == torch.bfloat16
    return sqnr(exact(q, k, v), out)


def dequantized(o: Operands) -> Three:
    query, key, value = (
        x.double() * s.double().repeat_interleave(x.shape[1] // s.shape[1], 1)[..., None, None]
        for x, s in ((o.query, o.query_scale), (o.key, o.key_scale), (o.value, o.value_scale))
    )
    return query, key, value


def test_floors() -> None:
    assert loss(gaussian()) > 25.3
    assert loss(gaussian(key_heads=2)) > 25.3
    assert loss(with_outliers()) > 25
    assert loss(with_outliers(), smooth=False) < 16


def test_smoothing_is_exact_up_to_rounding() -> None:
    """Keys without their mean give the same attention; with it they would lose 40 dB of 42 here."""
    q, k, v = with_outliers()
    mean = k.double().mean(dim=-2, keepdim=True)
    assert sqnr(exact(q, k, v), exact(q, k.double() - mean, v)) > 250
    o = quantize(q, k, v)
    assert sqnr(k.double() - mean, dequantized(o)[1]) > 31


def test_scales_are_of_heads() -> None:
    q, k, v = gaussian(heads=4, key_heads=2, tokens=32)
    q[:, 1] *= 64
    k[:, 1] /= 1024
    o = quantize(q, k, v, smooth=False)
    assert [s.shape for s in (o.query_scale, o.key_scale, o.value_scale)] == [(1, 2)] * 3
    assert {x.dtype for x in (o.query, o.key, o.value)} == {FP8_DTYPE}
    assert torch.equal(o.query_scale, q.float().abs().view(1, 2, -1).amax(-1) / FP8_MAX)
    for made, given in zip(dequantized(o), (q, k, v), strict=True):
        assert all(sqnr(given[:, i], made[:, i]) > 29 for i in range(2, given.shape[1]))
        assert sqnr(given, made) > 29


def test_equal_keys_and_zeros_are_no_nan() -> None:
    q, _, v = gaussian(tokens=16)
    for k in (torch.ones_like(q), torch.zeros_like(q)):
        out = emulated.attention_emulated(q, k, v, None, torch.float16)
        assert out.dtype == torch.float16
        assert sqnr(v.double().mean(dim=-2, keepdim=True).expand_as(v), out) > 25
    assert not emulated.attention_emulated(q, q, torch.zeros_like(q), None, torch.float16).any()


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = gaussian(tokens=50)
    whole = emulated.attention_emulated(q, k, v, None, torch.bfloat16)
    monkeypatch.setattr(emulated, "_MOST_SCORES", 7 * 4 * 50)
    assert torch.equal(emulated.attention_emulated(q, k, v, None, torch.bfloat16), whole)


def test_the_result_is_laid_out_as_the_queries() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in gaussian(tokens=16))
    out = emulated.attention_emulated(q, k, v, None, torch.bfloat16)
    assert out.stride() == q.stride()
    assert emulated.attention_emulated(q, k, v[..., :64], None, torch.bfloat16).shape == (1, 4, 16, 64)


def test_rounding_the_weights_costs_one_decibel(monkeypatch: pytest.MonkeyPatch) -> None:
    given = gaussian()
    monkeypatch.setattr(emulated, "rounded_to_e4m3", lambda x: x)
    assert loss(given) > 26.3


def as_the_template_does(*operands: Any) -> tuple[Tensor, None, None]:
    """What Inductor's template for GPUs computes of flex_attention's operands, in its dtypes."""
    q, k, v, score_mod, _, scale, _, buffers, _ = operands
    shared = q.shape[1] // k.shape[1]
    scores = (q.float() @ k.float().repeat_interleave(shared, 1).mT) * scale
    heads = [score_mod(scores[:, h], torch.tensor([0]), torch.tensor([h]), None, None, *buffers) for h in range(4)]
    scores = torch.stack(heads, dim=1)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    out = weights.to(q.dtype).float() @ v.float().repeat_interleave(shared, 1) / weights.sum(dim=-1, keepdim=True)
    return out.to(q.dtype), None, None


@pytest.mark.parametrize("key_heads", [4, 2])
def test_what_flex_attention_is_given(key_heads: int) -> None:
    """Its kernel runs on no CPU; with the arithmetic of its template, factors and layouts must come out right."""
    q, k, v = gaussian(key_heads=key_heads)
    with mock.patch.object(torch.ops.higher_order, "flex_attention", as_the_template_does, create=True):
        out = attention_flex(q, k, v, None, torch.bfloat16)
    assert 24.2 < sqnr(exact(q, k, v), out) < 25


@pytest.fixture(scope="module")
def of_pipelines() -> dict[str, list[Three]]:
    """The operands of all attentions in the last step of the embedded pipelines."""
    import diffusers

    from fp8_compile.embedded import EMBEDDED_CALLS, default_pipeline_dir

    found: dict[str, list[Three]] = {}
    written = torch.nn.functional.scaled_dot_product_attention
    for name, arguments in EMBEDDED_CALLS.items():
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(default_pipeline_dir(name), torch_dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        made: list[Three] = []

        def keep(query: Tensor, key: Tensor, value: Tensor, *a: Any, made: list[Three] = made, **more: Any) -> Tensor:
            made.append((query, key, value))
            out: Tensor = written(query, key, value, *a, **more)
            return out

        decode = mock.patch.object(pipe.vae, "decode", side_effect=StopIteration)
        attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", keep)
        with attention, decode, pytest.raises((StopIteration, RuntimeError)):
            pipe("a red circle", generator=torch.Generator().manual_seed(0), **arguments)
        layers = len(getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.layers)
        found[name] = made[-layers:]
    return found


@pytest.mark.pipeline
@pytest.mark.parametrize(("name", "floor"), [("qwen-image", 29.5), ("z-image", 29.5)])
def test_floors_on_real_operands(name: str, floor: float, of_pipelines: dict[str, list[Three]]) -> None:
    losses = [loss(three) for three in of_pipelines[name]]
    assert min(losses) > floor
