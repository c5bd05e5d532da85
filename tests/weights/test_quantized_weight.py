"""A parameter of FP8 values: right in eager mode, and whole after whatever a parameter goes through."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fp8_compile
from fp8_compile import numerics
from fp8_compile.schemes import scheme
from fp8_compile.schemes.fp8 import Fp8
from fp8_compile.weights.quantized_weight import QuantizedWeight
from tests.support.sqnr import sqnr

N, K = 48, 64
ROW, TENSOR = Fp8(), Fp8(granularity="tensor")
EACH = pytest.mark.parametrize("kind", [ROW, TENSOR], ids=["row", "tensor"])


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def plain() -> Tensor:
    return torch.randn(N, K, dtype=torch.bfloat16)


def layer(weight: Tensor | None = None, kind: Fp8 = ROW) -> nn.Linear:
    m = nn.Linear(K, N).bfloat16()
    m.weight = nn.Parameter(QuantizedWeight.quantize(plain() if weight is None else weight, kind), False)
    return m


def saved_and_loaded(value: Any, **how: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **how)


def same(a: Any, b: Any) -> bool:
    """Whether two FP8 weights hold the same bits, in memory of their own."""
    return (
        isinstance(a, QuantizedWeight)
        and isinstance(b, QuantizedWeight)
        and (a.dtype, a.scheme) == (b.dtype, b.scheme)
        and torch.equal(a.qdata.view(torch.uint8), b.qdata.view(torch.uint8))
        and torch.equal(a.scale, b.scale)
        and a.qdata.data_ptr() != b.qdata.data_ptr()
    )


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eager_use_dequantizes(kind: Fp8, dtype: torch.dtype) -> None:
    weight, x = torch.randn(N, K, dtype=dtype), torch.randn(3, K, dtype=dtype)
    m = nn.Linear(K, N, dtype=dtype)
    m.weight = nn.Parameter(QuantizedWeight.quantize(weight, kind), requires_grad=False)
    quantize = numerics.quantize_weight_rowwise if kind is ROW else numerics.quantize_weight_tensorwise
    expected = nn.functional.linear(x, numerics.dequantize(*quantize(weight), dtype), m.bias)
    assert torch.equal(m(x), expected)
    assert sqnr(expected, x @ m.weight.t() + m.bias) > 45
    with torch.inference_mode():
        assert torch.equal(m(x), expected)
    assert (m.weight.dtype, m.weight.scheme, m.weight.shape) == (dtype, kind, weight.shape)
    assert isinstance(m.weight, nn.Parameter)


@EACH
def test_chunks_change_no_bit(kind: Fp8, monkeypatch: pytest.MonkeyPatch) -> None:

    weight = plain()
    weight[5] = 0
    monkeypatch.setattr(scheme, "CHUNK_ON_CPU", 7 * K)
    quantize = numerics.quantize_weight_rowwise if kind is ROW else numerics.quantize_weight_tensorwise
    for made, expected in zip(kind.quantize_in_chunks(weight), quantize(weight), strict=True):
        assert torch.equal(made.float(), expected.float())
    assert kind.quantize_in_chunks(weight[:0])[0].shape == (0, K)


@EACH
def test_on_another_device_no_more_than_a_small_m_are_in_bf16(kind: Fp8, monkeypatch: pytest.MonkeyPatch) -> None:

    class Sizes(TorchDispatchMode):
        """Of what is on the device in another type than FP8."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if t.device.type == "meta" and t.dtype != numerics.FP8_DTYPE:
                    self.seen.add(t.numel())
            return out

    monkeypatch.setattr(scheme, "CHUNK", 7 * K)
    with Sizes() as sizes:
        made = QuantizedWeight.quantize(plain(), kind, device=torch.device("meta"))
    assert made.qdata.device.type == made.scale.device.type == "meta"
    assert (made.shape, made.scheme) == ((N, K), kind)
    assert max(sizes.seen) == 7 * K


def test_it_takes_half_the_memory() -> None:
    weight = plain()
    assert QuantizedWeight.quantize(weight, ROW).nbytes == N * K + 4 * N
    assert weight.nbytes == 2 * N * K


@pytest.mark.parametrize(
    "travel",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: saved_and_loaded(m, weights_only=False),
    ],
)
def test_copies_of_a_module(travel: Callable[[nn.Module], nn.Linear]) -> None:
    m, x = layer(), plain()[:2]
    other = travel(m)
    assert same(m.weight, other.weight)
    assert isinstance(other.weight, nn.Parameter)
    assert not other.weight.requires_grad
    before = m(x)
    other.weight.mul_(2)
    assert torch.equal(m(x), before)


def test_a_state_dict_goes_through_a_file_that_holds_no_code() -> None:
    m = layer()
    loaded = saved_and_loaded(m.state_dict(), weights_only=True)
    assert same(loaded["weight"], m.weight)
    other = layer()
    address = other.weight.qdata.data_ptr()
    other.load_state_dict(loaded)
    assert same(other.weight, m.weight)
    assert other.weight.qdata.data_ptr() == address
    other = nn.Linear(K, N).bfloat16()
    other.load_state_dict(loaded)  # FP8 into a plain parameter: its values
    assert type(other.weight) is nn.Parameter
    assert torch.equal(other.weight, m.weight.dequantize())
    other.load_state_dict(loaded, assign=True)
    assert torch.equal(other.weight.qdata.float(), m.weight.qdata.float())


def test_plain_values_are_quantized_on_their_way_in() -> None:
    m, weight = layer(kind=TENSOR), plain()
    m.load_state_dict({"weight": weight, "bias": m.bias})
    assert same(m.weight, QuantizedWeight.quantize(weight, TENSOR))
    m.load_state_dict({"weight": QuantizedWeight.quantize(weight, ROW), "bias": m.bias})
    assert m.weight.scheme == TENSOR
    assert sqnr(weight, m.weight.dequantize()) > 24


def test_moving_moves_bytes_and_keeps_the_parameter() -> None:
    m = layer()
    parameter, bits = m.weight, m.weight.qdata.clone()
    watched = weakref.ref(m.weight.qdata)  # what the binder holds; a reference to the parameter would forbid the move
    m.to("meta")
    assert m.weight is parameter
    assert m.weight.qdata.device.type == m.weight.device.type == "meta"
    assert watched() is None
    m.to_empty(device="cpu")
    assert isinstance(m.weight, QuantizedWeight)
    assert isinstance(m.weight, nn.Parameter)
    m.weight.copy_(QuantizedWeight(ROW, (bits, torch.ones(N, 1))))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        m.to(dtype)
        assert m.weight.dtype == dtype
        assert m(torch.randn(2, K, dtype=dtype)).dtype == dtype
    assert torch.equal(m.weight.qdata.float(), bits.float())


def test_its_identity_survives_a_move_and_not_a_copy() -> None:
    m = layer()
    identity = m.weight.identity
    m.to(torch.float16).to(torch.bfloat16)
    assert m.weight.identity is identity
    assert copy.deepcopy(m).weight.identity is not identity
    assert m.weight.clone().identity is not identity


def test_in_place_operators_reach_the_memory_that_compiled_code_reads() -> None:
    m = layer()
    weight: Any = m.weight
    inner, before, delta = weight.qdata, weight.dequantize(), plain() * 0.1
    weight.data += delta  # PEFT
    assert same(weight, QuantizedWeight.quantize(before + delta, ROW))
    before = weight.dequantize()
    assert weight.mul_(-2) is weight
    assert torch.equal(weight, -2 * before)
    torch._foreach_add_([weight], [before])
    assert sqnr(-before, weight.dequantize()) > 28
    before = weight.dequantize()
    weight[3, 5] = 0
    weight[7] = before[8]
    assert weight.dequantize()[3, 5] == 0
    assert torch.equal(weight.dequantize()[7], before[8])
    torch.add(weight, weight, out=weight)
    assert weight.qdata is inner


def test_data_may_be_exchanged() -> None:
    weight: Any = layer().weight
    new = plain()
    weight.data = new
    assert same(weight, QuantizedWeight.quantize(new, ROW))
    weight.data = weight.data.half()
    assert weight.dtype == torch.float16
    assert torch.equal(weight.qdata.float(), QuantizedWeight.quantize(new, ROW).qdata.float())
    weight.data = QuantizedWeight.quantize(new, TENSOR)
    assert weight.scheme == TENSOR


def test_stock_torch_compile_dequantizes_too() -> None:
    m, x = layer(), plain()[:3]
    assert torch.equal(torch.compile(m, backend="aot_eager", fullgraph=True)(x), m(x))


def test_gradients_pass_through_it_to_an_adapter() -> None:
    m = layer()
    with torch.enable_grad():
        x = plain()[:3].requires_grad_()
        m(x).sum().backward()
    assert sqnr(m.weight.dequantize().float().sum(0).expand(3, K), x.grad) > 40


def test_repr_tells_what_it_is() -> None:
    assert repr(layer().weight).startswith("QuantizedWeight([48, 64], Fp8(granularity='row', ")
    assert repr(layer().weight).endswith(", dtype=torch.bfloat16, device=cpu)")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda w: QuantizedWeight(ROW, (w.dequantize(), w.scale)), r"not 0: torch\.bfloat16 \[48, 64\]"),
        (lambda w: QuantizedWeight(ROW, (w.qdata, w.scale[:-1])), r"scale: torch\.float32 \[48, 1\] for a weight"),
        (lambda w: QuantizedWeight(ROW, (w.qdata, w.scale.half())), "1: torch.float16"),
        (lambda w: QuantizedWeight(ROW, (w.qdata,)), "qdata: .*, scale: .* not 0: "),
        (lambda w: QuantizedWeight(ROW, w.constants, torch.int8), "dtype=torch.int8"),
        (lambda w: QuantizedWeight(ROW, (w.scale[0], w.qdata)), "stand for no matrix"),
        (lambda w: w.copy_(w.qdata), "float8_e4m3fn values .* are no weight"),
        (lambda w: w.copy_(plain()[:3]), r"shape \[3, 64\] do not fit"),
        (lambda w: setattr(w, "data", plain()[:3]), r"\.data of shape \[3, 64\]"),
        (lambda w: w.resize_(3), "would change the shape"),
        (lambda w: QuantizedWeight.quantize(plain()[0], ROW), r"shape \[64\]"),
    ],
)
def test_what_it_cannot_do_is_an_error(attempt: Callable[[Any], Any], message: str) -> None:
    weight = layer().weight
    before = weight.dequantize()
    with pytest.raises(fp8_compile.QuantizedWeightError, match=message):
        attempt(weight)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("used", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.float16).to(torch.bfloat16),
        lambda m: m._apply(lambda t: t.clone()),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight, requires_grad=False)),
        lambda m: setattr(m.weight, "data", m.weight.data.clone()),
        lambda m: (m.weight.detach(), m.weight.t(), m.weight.view(-1), m.weight[0], m.weight.chunk(2)),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.load_state_dict(saved_and_loaded(m.state_dict(), weights_only=True)),
        lambda m: m.weight.mul_(1),
        lambda m: m.requires_grad_(False),
    ],
    ids=["to", "cast", "clone", "parameter", "data", "views", "state dict", "file", "in place", "requires_grad"],
)
def test_inside_and_outside_of_inference_mode(made: Any, used: Any, use: Callable[[Any], Any]) -> None:
    """A BF16 weight takes all of it; so does a quantized one, wherever it was made."""
    m = nn.Linear(K, N).bfloat16()
    with made():
        m.weight = QuantizedWeight(QuantizedWeight.quantize(plain(), ROW))  # type: ignore[assignment]
    x, weight = plain()[:3], m.weight.dequantize()
    with used():
        use(m)
        assert isinstance(m.weight, QuantizedWeight)
        assert not m.weight.is_inference()
        assert sqnr(nn.functional.linear(x, weight, m.bias), m(x)) > 40
    m.weight.mul_(2)  # and outside again
    assert sqnr(2 * weight, m.weight.dequantize()) > 40
