from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8_compile.passes.graphs import example
from fp8_compile.passes.linears import Linear, find_linears, module_path, other_readers, parameter_path_of, source_path
from tests.support.graphs import Call, Captured, capture, rand

Function = Callable[..., Any]
aten = torch.ops.aten

# Each computes x @ w.T (+ b) of a weight [N, K], on two dimensions.
STORED_NK: dict[str, Function] = {
    "F.linear": lambda m, x: F.linear(x, m.w),
    "F.linear bias": lambda m, x: F.linear(x, m.w, m.b),
    "F.linear bias None": lambda m, x: F.linear(x, m.w, None),
    "F.linear keywords": lambda m, x: F.linear(input=x, weight=m.w, bias=m.b),
    "F.linear some keywords": lambda m, x: F.linear(x, bias=m.b, weight=m.w),
    "F.linear of two transpositions": lambda m, x: F.linear(x, m.w.t().transpose(0, 1)),
    "F.linear of a cast": lambda m, x: F.linear(x, m.w.to(x.dtype), m.b),
    "F.linear of type_as": lambda m, x: F.linear(x, m.w.type_as(x)),
    "F.linear of contiguous": lambda m, x: F.linear(x, m.w.contiguous()),
    "F.linear of detach": lambda m, x: F.linear(x, m.w.detach()),
    "@ .t()": lambda m, x: x @ m.w.t(),
    "@ torch.t": lambda m, x: x @ torch.t(m.w),
    "@ .T": lambda m, x: x @ m.w.T,
    "@ .mT": lambda m, x: x @ m.w.mT,
    "@ .transpose": lambda m, x: x @ m.w.transpose(0, 1),
    "@ .transpose negative": lambda m, x: x @ m.w.transpose(-2, -1),
    "@ .transpose mixed": lambda m, x: x @ m.w.transpose(1, -2),
    "@ .transpose keywords": lambda m, x: x @ m.w.transpose(dim0=0, dim1=1),
    "@ torch.transpose": lambda m, x: x @ torch.transpose(m.w, 0, 1),
    "@ .permute": lambda m, x: x @ m.w.permute(1, 0),
    "@ .permute tuple": lambda m, x: x @ m.w.permute((1, 0)),
    "@ torch.permute": lambda m, x: x @ torch.permute(m.w, (1, 0)),
    "@ .t().contiguous()": lambda m, x: x @ m.w.t().contiguous(),
    "@ cast and .t()": lambda m, x: x @ m.w.to(torch.bfloat16).t(),
    "@ three transpositions": lambda m, x: x @ m.w.t().t().T,
    "mm": lambda m, x: torch.mm(x, m.w.t()),
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w.t()),
    ".addmm": lambda m, x: m.b.addmm(x, m.w.t()),
    "aten.linear": lambda m, x: aten.linear(x, m.w, m.b),
    "aten.linear.default": lambda m, x: aten.linear.default(x, m.w),
    "aten.addmm": lambda m, x: aten.addmm(m.b, x, aten.t(m.w)),
    "aten.addmm.default": lambda m, x: aten.addmm.default(m.b, x, aten.t.default(m.w)),
    "aten.mm": lambda m, x: aten.mm.default(x, aten.permute.default(m.w, [1, 0])),
    "aten.matmul": lambda m, x: aten.matmul(x, aten.transpose.int(m.w, 0, 1)),
}

# Each computes x @ w (+ b) of a weight [K, N].
STORED_KN: dict[str, Function] = {
    "@": lambda m, x: x @ m.w,
    "__matmul__": lambda m, x: x.__matmul__(m.w),
    "matmul": lambda m, x: torch.matmul(x, m.w),
    "matmul keywords": lambda m, x: torch.matmul(input=x, other=m.w),
    ".matmul": lambda m, x: x.matmul(m.w),
    ".matmul keyword": lambda m, x: x.matmul(other=m.w),
    "mm": lambda m, x: torch.mm(x, m.w),
    "mm keywords": lambda m, x: torch.mm(input=x, mat2=m.w),
    ".mm": lambda m, x: x.mm(m.w),
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w),
    "addmm keywords": lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.w),
    "addmm neutral beta, alpha": lambda m, x: torch.addmm(m.b, x, m.w, beta=1, alpha=1.0),
    ".addmm": lambda m, x: m.b.addmm(x, m.w),
    "F.linear of .t()": lambda m, x: F.linear(x, m.w.t()),
    "F.linear of .T, bias": lambda m, x: F.linear(x, m.w.T, m.b),
    "@ two transpositions": lambda m, x: x @ m.w.t().t(),
    "aten.mm": lambda m, x: aten.mm(x, m.w),
    "aten.addmm": lambda m, x: aten.addmm.default(m.b, x, m.w),
}

# What multiplies by a weight [64, 64] in another way, and its name in the report.
OTHERS: dict[str, tuple[Function, str]] = {
    "einsum": (lambda m, x: torch.einsum("nk,ok->no", x, m.w), "einsum"),
    "inner": (lambda m, x: torch.inner(x, m.w), "inner"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w.t(), dims=([1], [0])), "tensordot"),
    "cdist": (lambda m, x: torch.cdist(x, m.w), "cdist"),
    "attention": (
        lambda m, x: F.multi_head_attention_forward(
            x[:, None],
            x[:, None],
            x[:, None],
            64,
            2,
            None,
            None,
            None,
            None,
            False,
            0.0,
            m.w,
            None,
            use_separate_proj_weight=True,
            q_proj_weight=m.w,
            k_proj_weight=m.w,
            v_proj_weight=m.w,
            need_weights=False,
        )[0],
        "multi_head_attention_forward",
    ),
}

NO_PRODUCTS: dict[str, Function] = {
    "embedding": lambda m, x: F.embedding(x[:, 0].long() % 64, m.w),
    "indexing": lambda m, x: x + m.w[0],
    "sum of equal shapes": lambda m, x: x[:1] + m.w,
    "scaled": lambda m, x: m.w * x.mean(),
    "norm": lambda m, x: x * m.w.norm(),
    "linear besides": lambda m, x: F.linear(x, m.w) + torch.einsum("nk,ok->no", x, m.w),
    "nothing": lambda m, x: x + 1,
}


def linears(captured: Captured) -> list[Linear]:
    return list(find_linears(captured.graph))


@pytest.mark.parametrize("form", OTHERS)
def test_a_matrix_that_is_no_linears_is_told_with_what_reads_it(form: str) -> None:
    function, name = OTHERS[form]
    captured = capture(Call(function, w=(64, 64)), rand(8, 64))
    ((weight, reader),) = other_readers(captured.graph, lambda node: isinstance(example(node), nn.Parameter))
    assert (parameter_path_of(weight), getattr(reader.target, "__name__", reader.target)) == ("w", name)


@pytest.mark.parametrize("form", NO_PRODUCTS)
def test_a_matrix_that_is_not_multiplied_is_passed_over(form: str) -> None:
    captured = capture(Call(NO_PRODUCTS[form], w=(64, 64)), rand(8, 64))
    assert list(other_readers(captured.graph, lambda node: isinstance(example(node), nn.Parameter))) == []


def compute(captured: Captured, linear: Linear) -> Tensor:
    """What ``linear`` says that its node computes."""
    weight, x = captured.value(linear.weight), captured.value(linear.input)
    return F.linear(x, weight.t() if linear.transposed else weight, linear.bias and captured.value(linear.bias))


@pytest.mark.parametrize("form", STORED_NK)
def test_weight_stored_output_features_first(form: str) -> None:
    module, x = Call(STORED_NK[form], w=(32, 64), b=(32,)), rand(8, 64)
    captured = capture(module, x)
    (linear,) = linears(captured)
    assert not linear.transposed
    assert linear.unusual is None
    torch.testing.assert_close(compute(captured, linear), module(x))


@pytest.mark.parametrize("form", STORED_KN)
def test_weight_stored_input_features_first(form: str) -> None:
    module, x = Call(STORED_KN[form], w=(64, 32), b=(32,)), rand(8, 64)
    captured = capture(module, x)
    (linear,) = linears(captured)
    assert linear.transposed
    assert linear.unusual is None
    torch.testing.assert_close(compute(captured, linear), module(x))


@pytest.mark.parametrize("shape", [(64,), (8, 64), (2, 8, 64), (2, 3, 4, 64), (1, 2, 1, 4, 64)], ids=str)
@pytest.mark.parametrize(
    ("function", "transposed"),
    [
        (lambda m, x: F.linear(x, m.w, m.b), False),
        (lambda m, x: x @ m.w.T, False),
        (lambda m, x: torch.matmul(x, m.v), True),
    ],
    ids=["F.linear", "@", "matmul"],
)
def test_leading_dimensions(function: Function, transposed: bool, shape: tuple[int, ...]) -> None:
    module, x = Call(function, w=(32, 64), v=(64, 32), b=(32,)), rand(*shape)
    captured = capture(module, x)
    (linear,) = linears(captured)
    assert linear.transposed == transposed
    torch.testing.assert_close(compute(captured, linear), module(x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_module(bias: bool) -> None:
    module = nn.Sequential(nn.Linear(64, 32, bias=bias), nn.GELU(), nn.Linear(32, 16, bias=bias)).bfloat16()
    found = linears(capture(module, rand(8, 64)))
    assert [module_path(linear) for linear in found] == ["0", "2"]
    assert [(linear.bias is not None, linear.transposed) for linear in found] == [(bias, False)] * 2


@pytest.mark.parametrize("shape", [(8, 64), (2, 8, 64)], ids=str)
def test_conv1d_of_transformers(shape: tuple[int, ...]) -> None:
    from transformers.pytorch_utils import Conv1D

    module = nn.ModuleDict({"c_attn": Conv1D(32, 64).bfloat16()})
    captured = capture(lambda x: module["c_attn"](x), rand(*shape))
    (linear,) = linears(captured)
    assert linear.transposed
    assert linear.unusual is None
    assert captured.value(linear.weight) is module["c_attn"].weight
    assert linear.bias is not None
    assert captured.value(linear.bias) is module["c_attn"].bias


def _attention(m: nn.Module, x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(-1, -2), -1) @ x


@pytest.mark.parametrize(
    "function",
    [
        _attention,
        lambda m, x: torch.matmul(x, x.mT),
        lambda m, x: torch.mm(x, x.t()),
        lambda m, x: x.mm(x.t()),
        lambda m, x: torch.addmm(m.b, x, x.t()),
        lambda m, x: torch.bmm(x[None], x.t()[None]),
        lambda m, x: m.w @ x.t(),
        lambda m, x: torch.mm(m.w, x.t()),
        lambda m, x: m.w.matmul(x.t()),
        lambda m, x: torch.addmm(m.b, m.w, x.t()),
        lambda m, x: x @ m.buffer,
        lambda m, x: x @ m.three,
        lambda m, x: x @ m.vector,
        lambda m, x: x @ (m.w * 2).t(),
    ],
)
def test_no_linear(function: Function) -> None:
    """Products of activations, a parameter on the left, and a right operand that is no matrix of parameters."""
    module = Call(function, w=(64, 64), b=(8,), three=(2, 64, 64), vector=(64,))
    module.register_buffer("buffer", rand(64, 64))
    x = rand(8, 64)
    if function(module, x).shape[-1:] != (8,):
        module.b.data = rand(64)
    assert linears(capture(module, x)) == []


@pytest.mark.parametrize(
    ("function", "unusual"),
    [
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), "addmm with beta or alpha"),
        (lambda m, x: torch.addmm(m.b, x, m.w, alpha=0.5), "addmm with beta or alpha"),
        (lambda m, x: m.b.addmm(x, m.w, beta=0), "addmm with beta or alpha"),
        (lambda m, x: torch.addmm(m.residual, x, m.w), "addmm whose summand is no bias vector"),
        (lambda m, x: torch.addmm(m.residual[0, 0], x, m.w), "addmm whose summand is no bias vector"),
        (lambda m, x: torch.addmm(x.sum(1, keepdim=True), x, m.w), "addmm whose summand is no bias vector"),
    ],
)
def test_unusual_addmm(function: Function, unusual: str) -> None:
    (linear,) = linears(capture(Call(function, w=(64, 32), b=(32,), residual=(8, 32)), rand(8, 64)))
    assert linear.unusual == unusual


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.w * 2),
        lambda m, x: F.linear(x, m.w.float().to(torch.bfloat16)),
        lambda m, x: F.linear(x, m.w.clone()),
        lambda m, x: F.linear(x, m.w.view(32, 64)),
        lambda m, x: F.linear(x, m.buffer),
        lambda m, x: F.linear(x, m.buffer.t().t()),
        lambda m, x: F.linear(x, x[:, :64]),
    ],
)
def test_f_linear_is_a_linear_whatever_its_weight(function: Function) -> None:
    module = Call(function, w=(32, 64))
    module.register_buffer("buffer", rand(32, 64))
    captured = capture(module, rand(8, 64))
    (linear,) = linears(captured)
    assert not isinstance(linear.weight.meta["example_value"], nn.Parameter)
    assert not linear.transposed


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.w.transpose(1, 1)),
        lambda m, x: F.linear(x, m.w.transpose(0, -2)),
        lambda m, x: F.linear(x, m.w.permute(0, 1)),
        lambda m, x: F.linear(x, m.w.permute(-2, -1)),
    ],
)
def test_dimensions_that_stay_in_place_are_no_transposition(function: Function) -> None:
    (linear,) = linears(capture(Call(function, w=(32, 64)), rand(8, 64)))
    assert not linear.transposed
    assert linear.weight.meta["example_value"].shape == (32, 64)


def test_cast_that_changes_the_type_hides_the_parameter() -> None:
    module = Call(lambda m, x: F.linear(x, m.w.float()), w=(32, 64))
    (linear,) = linears(capture(module, rand(8, 64).float()))
    assert linear.weight.op == "call_method"


def test_order_is_the_graphs() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(torch.addmm(m.b, x @ m.u, m.v), m.w)

    found = linears(capture(Call(function, u=(64, 64), v=(64, 64), w=(32, 64), b=(64,)), rand(8, 64)))
    assert [module_path(linear) for linear in found] == ["u", "v", "w"]


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['self']._modules['blocks']._modules['0']._modules['to_q']", "blocks.0.to_q"),
        ("L['self']._modules['attn']._buffers['scale']", "attn.scale"),
        ("L['self'].attn.to_q", "attn.to_q"),
        ("L['self'].__dict__['_modules']['img_in']", "img_in"),
        ("L['self'].blocks[7].to_q", "blocks.7.to_q"),
        ("L['self'].blocks.7.to_q", "blocks.7.to_q"),
        ("G['m'].blocks.0.to_q", "blocks.0.to_q"),
        ("G['model']._modules['net']._modules['2']._parameters['weight']", "net.2.weight"),
        ("L['self']._modules['base_layer']._modules['lora_A']._modules['my-adapter']", "base_layer.lora_A.my-adapter"),
        ("L['self']._parameters['weight']", "weight"),
        ("L['self']", ""),
        ("L['x']", ""),
    ],
)
def test_source_path(source: str, path: str) -> None:
    assert source_path(source) == path


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(64, 64)
        self.to_out = nn.ModuleList([nn.Linear(64, 64), nn.Dropout(0.0)])
        self.scale_shift = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](self.to_q(x))) @ self.scale_shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention()}) for _ in range(2))
        self.proj_out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["attn"](x)
        return self.proj_out(x)


def paths(model: Callable[..., Any], *args: Any) -> list[str]:
    return [module_path(linear) for linear in linears(capture(model, *args))]


IN_ATTENTION = ["to_q", "to_out.0", "scale_shift"]
IN_MODEL = [*(f"blocks.{i}.attn.{name}" for i in (0, 1) for name in IN_ATTENTION), "proj_out"]
global_model = Model().bfloat16()


def call_global_model(x: Tensor) -> Tensor:
    return global_model(x)


def test_paths_are_those_of_named_modules() -> None:
    model = Model().bfloat16()
    assert paths(model, rand(8, 64)) == IN_MODEL
    assert {p for p in IN_MODEL if "scale_shift" not in p} <= dict(model.named_modules()).keys()


def test_paths_begin_at_the_compiled_region() -> None:
    assert paths(Model().bfloat16().blocks[1]["attn"], rand(8, 64)) == IN_ATTENTION


def test_paths_of_a_global_module() -> None:
    assert paths(call_global_model, rand(8, 64)) == IN_MODEL


def test_paths_of_a_module_in_a_closure() -> None:
    model = Model().bfloat16()
    assert paths(lambda x: model(x), rand(8, 64)) == IN_MODEL


def test_paths_of_a_module_given_as_an_argument() -> None:
    model = Model().bfloat16()
    assert paths(lambda m, x: m(x), model, rand(8, 64)) == IN_MODEL


def test_paths_of_a_bound_method() -> None:
    assert paths(Model().bfloat16().forward, rand(8, 64)) == IN_MODEL


def test_path_of_modules_that_share_a_weight_is_the_running_one() -> None:
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    module[1].weight = module[0].weight
    assert paths(module, rand(8, 64)) == ["0", "1"]


def test_path_of_an_output_linear_tied_to_an_embedding() -> None:
    module = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 32)).bfloat16()
    module[1].weight = module[0].weight
    assert paths(module, torch.arange(8)) == ["1"]


def test_path_of_another_modules_parameter() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.table = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight) @ self.table

    assert paths(Functional().bfloat16(), rand(8, 64)) == ["inner", "table"]


def test_path_of_a_region_that_is_a_linear() -> None:
    """`named_modules` calls it the empty path, and ``weight`` is no layer's name."""
    assert paths(nn.Linear(64, 64).bfloat16(), rand(8, 64)) == [""]
