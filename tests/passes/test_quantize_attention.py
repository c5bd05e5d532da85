"""Attentions in FP8: each form that is rewritten, each that is not, and by which names."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import fp8_compile
from fp8_compile import attention as kernels
from fp8_compile.attention.kernel import Question
from fp8_compile.options import Fp8Options
from fp8_compile.passes.context import Context
from fp8_compile.passes.graphs import copy_graph, module_of
from fp8_compile.passes.quantize_attention import quantize_attention
from tests.support.graphs import Call, Captured, capture, rand, show
from tests.support.sqnr import sqnr

Q = rand(1, 4, 48, 64)
TOKENS_FIRST = rand(1, 48, 4, 64)
aten = torch.ops.aten


def rewrite(function: Callable[..., Any], *inputs: Tensor, attention: str = "fp8-emulated") -> tuple[Any, Any, Context]:
    captured = capture(Call(function), *inputs)
    context = Context(captured.gm, Fp8Options(attention=attention))
    graph = copy_graph(captured.gm)
    count = quantize_attention(graph, context)
    graph.lint()
    assert count == sum(a.kernel is not None for a in context.plan.attentions)
    return captured, graph, context


def check(captured: Captured, graph: Any, at_least: float = 20) -> None:
    """The rewritten graph gives nearly what the other did."""
    with torch.no_grad():
        (got,), (expected,) = module_of(graph, captured.gm)(*captured.inputs), captured.gm(*captured.inputs)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert at_least < sqnr(expected.float(), got) < 40


def lines(graph: Any) -> str:
    """The lines of `show` from the attention on, as flex_attention has many before it."""
    return "\n".join(line for line in show(graph).split("\n") if "attention" in line or line.startswith("return"))


def test_sdpa() -> None:
    captured, graph, context = rewrite(lambda m, q: scaled_dot_product_attention(q, q, q) + 1, Q)
    assert_expected_inline(
        show(graph),
        """\
x: bfloat16[1, 4, 48, 64]
attention_emulated = attention_emulated(x, x, x, None, torch.bfloat16)
add = add(attention_emulated, 1)
return (add,)""",
    )
    check(captured, graph)
    (decision,) = context.plan.attentions
    assert (decision.path, decision.queries, decision.heads, decision.head_size) == ("sdpa", 48, 4, 64)


FORMS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "a scale": (lambda m, q: scaled_dot_product_attention(q, q, q, None, 0.0, False, scale=0.2), Q),
    "grouped queries": (lambda m, q: scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True), Q),
    "float16": (lambda m, q: scaled_dot_product_attention(q, q, q), Q.half()),
    "aten": (lambda m, q: aten.scaled_dot_product_attention.default(q, q, q), Q),
    "a kernel for CPUs": (lambda m, q: aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q)[0], Q),
    "diffusers": (lambda m, x: dispatch_attention_fn(x, x, x), TOKENS_FIRST),
    "diffusers, flash": (lambda m, x: dispatch_attention_fn(x, x, x, backend="_native_flash"), TOKENS_FIRST),
    "diffusers, flex": (lambda m, x: dispatch_attention_fn(x, x, x, backend="flex", scale=0.2), TOKENS_FIRST),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms(name: str) -> None:
    function, x = FORMS[name]
    captured, graph, _ = rewrite(function, x)
    assert lines(graph) == SNAPSHOTS[name]
    if name != "diffusers, flex":  # which runs in a compiled graph only
        check(captured, graph)


SNAPSHOTS = {
    "a scale": """\
attention_emulated = attention_emulated(x, x, x, 0.2, torch.bfloat16)
return (attention_emulated,)""",
    "grouped queries": """\
attention_emulated = attention_emulated(x, getitem, getitem_1, None, torch.bfloat16)
return (attention_emulated,)""",
    "float16": """\
attention_emulated = attention_emulated(x, x, x, None, torch.float16)
return (attention_emulated,)""",
    "aten": """\
attention_emulated = attention_emulated(x, x, x, None, torch.bfloat16)
return (attention_emulated,)""",
    "a kernel for CPUs": """\
attention_emulated = attention_emulated(x, x, x, None, torch.bfloat16)
return (attention_emulated,)""",
    "diffusers": """\
attention_emulated = attention_emulated(query, key, value, None, torch.bfloat16)
out_1 = .permute(attention_emulated, 0, 2, 1, 3)
return (out_1,)""",
    "diffusers, flash": """\
attention_emulated = attention_emulated(query, key, value, None, torch.bfloat16)
out_1 = .permute(attention_emulated, 0, 2, 1, 3)
return (out_1,)""",
    "diffusers, flex": """\
attention_emulated = attention_emulated(query, key, value, 0.2, torch.bfloat16)
out_2 = .permute(attention_emulated, 0, 2, 1, 3)
return (out_2,)""",
}


def joint(m: nn.Module, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """As Qwen-Image's: text and image in one attention."""
    x = torch.cat([text, image], dim=1)
    out = dispatch_attention_fn(x, x, x).flatten(2)
    return out[:, : text.shape[1]], out[:, text.shape[1] :]


def test_joint_attention() -> None:
    _, graph, _ = rewrite(joint, TOKENS_FIRST, rand(1, 8, 4, 64))
    assert_expected_inline(
        show(graph),
        """\
more.0: bfloat16[1, 8, 4, 64]
x: bfloat16[1, 48, 4, 64]
x = cat((more.0, x), dim=1)
query = .permute(x, 0, 2, 1, 3)
key = .permute(x, 0, 2, 1, 3)
value = .permute(x, 0, 2, 1, 3)
attention_emulated = attention_emulated(query, key, value, None, torch.bfloat16)
out_1 = .permute(attention_emulated, 0, 2, 1, 3)
out_2 = .flatten(out_1, 2)
getitem = getitem(out_2, (slice(None, None, None), slice(None, 8, None)))
getitem_1 = getitem(out_2, (slice(None, None, None), slice(8, None, None)))
return (getitem, getitem_1)""",
    )


@pytest.mark.parametrize(
    ("operator", "more"),
    [
        (aten._scaled_dot_product_flash_attention.default, ()),
        (aten._scaled_dot_product_efficient_attention.default, (None, False)),
        (aten._scaled_dot_product_cudnn_attention.default, (None, False)),
    ],
)
def test_operators_of_gpus(operator: Any, more: tuple[Any, ...]) -> None:
    """No CPU runs them, so the graph is written by hand."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    several = graph.call_function(operator, (x, x, x, *more), {"scale": 0.2})
    result = graph.call_function(getitem, (several, 0))
    graph.output(result)
    for node in (x, result):
        node.meta["example_value"] = Q
    context = Context(torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), Fp8Options(attention="fp8-emulated"))
    assert quantize_attention(graph, context) == 1
    assert_expected_inline(
        show(graph),
        """\
x: bfloat16[1, 4, 48, 64]
attention_emulated = attention_emulated(x, x, x, 0.2, torch.bfloat16)
return attention_emulated""",
    )


def lse_too(m: nn.Module, q: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q)
    return out, lse


def alibi(m: nn.Module, q: Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, q, q, score_mod=lambda score, b, h, m, n: score + (m - n))


def checkpointed(m: nn.Module, q: Tensor) -> Any:
    return checkpoint(lambda x: scaled_dot_product_attention(x, x, x), q, use_reentrant=False)


REFUSED: dict[str, tuple[Callable[..., Any], Tensor, str]] = {
    "a mask": (lambda m, q: scaled_dot_product_attention(q, q, q, q[..., :48] > 0), Q, "has a mask"),
    "causal": (lambda m, q: scaled_dot_product_attention(q, q, q, is_causal=True), Q, "is causal"),
    "dropout": (lambda m, q: scaled_dot_product_attention(q, q, q, None, 0.1), Q, "drops out"),
    "float32": (
        lambda m, q: scaled_dot_product_attention(q, q, q),
        Q.float(),
        "its operands are float32, not bfloat16 or float16",
    ),
    "three dimensions": (
        lambda m, q: scaled_dot_product_attention(q, q, q),
        Q[0],
        "its operands have 3 dimensions, not 4",
    ),
    "two results": (lse_too, Q, "its log-sum-exp is read, too, as ring attention does"),
    "a higher-order operator": (checkpointed, Q, "inside a higher-order operator"),
    "a score_mod": (alibi, Q, "score_mod changes the scores"),
    "a block mask": (
        lambda m, x: dispatch_attention_fn(x, x, x, x[:, None, None, :, 0, 0] > 0, backend="flex"),
        TOKENS_FIRST,
        "has a mask",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, x, reason = REFUSED[name]
    captured, graph, context = rewrite(function, x)
    assert [(a.kernel, a.reason) for a in context.plan.attentions] == [(None, reason)]
    assert str(graph) == str(captured.graph)


def test_left_alone_by_default_and_by_a_cpu() -> None:
    for option, found in (("as-written", []), ("fp8", ["no kernel computes attention in FP8 on cpu"])):
        captured, graph, context = rewrite(lambda m, q: scaled_dot_product_attention(q, q, q), Q, attention=option)
        assert [a.reason for a in context.plan.attentions] == found
        assert str(graph) == str(captured.graph)


NO_PACKAGE = "FlashAttention 3 needs the package flash_attn_interface"
NOT_HOPPER = "FlashAttention 3 needs compute capability 9.0"
TOO_OLD = "flex_attention needs compute capability 8.9 for FP8"
NO_INDUCTOR = "flex_attention is generated by Inductor, and inner_backend is another"


@pytest.mark.parametrize(
    ("capability", "size", "inductor", "kernel", "reason"),
    [
        ((9, 0), 128, True, "fp8-flex", NO_PACKAGE),
        ((12, 0), 128, True, "fp8-flex", NOT_HOPPER),
        ((8, 0), 128, True, None, f"{NOT_HOPPER}; {TOO_OLD}"),
        ((8, 9), 16, True, None, f"{NOT_HOPPER}; flex_attention needs a head size of at least 32 for FP8"),
        ((9, 0), 72, False, None, f"FlashAttention 3 has FP8 for head sizes 64, 128, 256, not 72; {NO_INDUCTOR}"),
    ],
)
def test_kernels_say_why_not(
    capability: tuple[int, int], size: int, inductor: bool, kernel: str | None, reason: str
) -> None:
    found, why = kernels.choose("fp8", Question(torch.device("cuda"), capability, size, size, inductor))
    assert (None if found is None else found.name, why) == (kernel, reason)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 32)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


def compiled(how: str, **options: Any) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    model = Model().bfloat16().requires_grad_(False)
    given = {"inner_backend": "aot_eager", "min_features": 64, "attention": "fp8-emulated", **options}
    if how == "whole":
        model.compile(backend="fp8_diffusion", options=given)
    for block in model.transformer_blocks if how == "block by block" else ():
        block.compile(backend="fp8_diffusion", options=given)
    with torch.no_grad():
        return model, model(rand(1, 16, 64))


@pytest.mark.filterwarnings("ignore:none of the:fp8_compile.NothingConvertedWarning")
@pytest.mark.parametrize("how", ["whole", "block by block"])
@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("attn", [0, 1, 2, 3]),
        ("transformer_blocks.0.*", [0]),
        ("re:blocks\\.[03]\\.attn\\.sdpa", [0, 3]),
    ],
)
def test_patterns_name_attentions(how: str, pattern: str, kept: list[int]) -> None:
    """Also where one graph would serve all blocks."""
    model, out = compiled(how, ignored_layers=[pattern])
    report = fp8_compile.report(model)
    decided = {row.path: row.decision for row in report.attentions}
    assert decided == {f"transformer_blocks.{i}.attn.sdpa": "as-written" if i in kept else "fp8" for i in range(4)}
    assert report.unmatched_patterns == ()
    # A second call runs what was compiled, and no block by the graph of another.
    assert torch.equal(model(rand(1, 16, 64)), out)
    assert {row.decision for row in report.layers} == {"quantized"} or "sdpa" not in pattern
    if pattern.endswith("sdpa"):
        _, expected = compiled("whole", ignored_layers=[pattern])
        assert torch.equal(out, expected)


def test_layers_keep_attentions_too() -> None:
    model, _ = compiled("block by block", layers={"transformer_blocks.1.attn.sdpa": "keep"})
    rows = fp8_compile.report(model).attentions
    assert [row.decision for row in rows] == ["fp8", "as-written", "fp8", "fp8"]


def test_an_attention_without_linears_stays_if_a_pattern_may_mean_it() -> None:
    captured = capture(Call(lambda m, q: scaled_dot_product_attention(q, q, q)), Q)
    for ignored, kernel in (((), "fp8-emulated"), (("attn",), None)):
        context = Context(captured.gm, Fp8Options(attention="fp8-emulated", ignored_layers=ignored))
        quantize_attention(copy_graph(captured.gm), context)
        assert [a.kernel for a in context.plan.attentions] == [kernel]
    assert context.plan.attentions[0].reason == "nothing names this layer, and a pattern may mean it"


def test_the_report() -> None:
    model, _ = compiled("block by block", ignored_layers=["blocks.0.attn.sdpa"])
    text = str(fp8_compile.report(model))
    assert_expected_inline(
        "\n".join(line for line in text.split("\n") if "sdpa" in line or "head size" in line),
        """\
attention                       x  tokens  heads  head size  decision  kernel        reason
transformer_blocks.*.attn.sdpa  4  16      2      32         fp8       fp8-emulated
pattern 'blocks.0.attn.sdpa' matched nothing""",
    )


def test_asking_in_vain_is_a_warning() -> None:
    why = r"none of the 1 attentions of this graph \(attention='fp8'\) was quantized: 1 x no kernel computes attention"
    with pytest.warns(fp8_compile.NothingConvertedWarning, match=why):
        compiled("block by block", attention="fp8")
    compiled("block by block", attention="fp8", ignored_layers=["sdpa"])  # as it was asked to


def test_sizes_that_are_known_only_at_run_time() -> None:
    """One graph for all numbers of tokens and all batches."""
    torch.manual_seed(0)
    model = Model().bfloat16().requires_grad_(False)
    written = [model(rand(batch, tokens, 64)) for batch, tokens in ((2, 16), (3, 48))]
    options = {"inner_backend": "aot_eager", "min_features": 64, "attention": "fp8-emulated"}
    model.compile(backend="fp8_diffusion", dynamic=True, options=options)
    with torch.no_grad():
        for expected in written:
            assert 20 < sqnr(expected.float(), model(rand(*expected.shape))) < 50
    report = fp8_compile.report(model)
    assert len(report.graphs) == 1
    assert {row.decision for row in report.attentions} == {"fp8"}
