"""From parameters to constants: right for every module, never stale, never made twice, freed with the model."""

from __future__ import annotations

import copy
import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fp8_compile
from fp8_compile.runtime import constants
from fp8_compile.weights.fingerprint import fingerprint
from tests.support.blocks import OPTIONS, WIDTH, Model, model, tokens
from tests.support.sqnr import sqnr

# Four linears in a block; this small random model loses about 25 dB to FP8 in total.
LINEARS = 4
FLOOR = 24.0


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def quantized(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How many weights were quantized since the last time this was asked."""
    caplog.set_level(logging.DEBUG, logger="fp8_compile.runtime")

    def count() -> int:
        found = sum("quantized the weight" in record.message for record in caplog.records)
        caplog.clear()
        return found

    return count


def fresh(m: Model, x: Tensor, **options: Any) -> Tensor:
    """What a model with these weights gives when everything about it is new."""
    return copy_of(m).compile_whole(**options)(x)


def copy_of(m: Model) -> Model:
    other = model(len(m.blocks))
    other.load_state_dict(m.state_dict())
    return other


def test_every_block_runs_with_its_own_weights(quantized: Callable[[], int]) -> None:
    m, x = model(), tokens()
    expected = [block(x) for block in m.blocks]
    m.compile_blocks()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for block, output in zip(m.blocks, expected, strict=True):
                assert sqnr(output, block(x)) > FLOOR
    assert quantized() == 3 * LINEARS


def test_whole_and_regional_compilation_agree_bit_by_bit() -> None:
    m, x = model(), tokens()
    torch.testing.assert_close(copy_of(m).compile_blocks()(x), copy_of(m).compile_whole()(x), rtol=0, atol=0)


def test_two_models_of_one_class() -> None:
    first, second, x = model(), model(), tokens()
    expected = first(x), second(x)
    first.compile_blocks()
    second.compile_blocks()
    for _ in range(2):
        assert sqnr(expected[0], first(x)) > FLOOR
        assert sqnr(expected[1], second(x)) > FLOOR


def test_two_option_sets_on_one_model_keep_apart() -> None:
    m, x = model(), tokens()
    row = torch.compile(m, backend="fp8_diffusion", options=OPTIONS)
    tensor = torch.compile(m, backend="fp8_diffusion", options={**OPTIONS, "granularity": "tensor"})
    outputs = [f(x) for f in (row, tensor, row, tensor)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert {row.scheme for row in fp8_compile.report(m).layers} == {"fp8-row+fp8-tensor"}


def test_a_recompile_with_other_shapes_quantizes_nothing_again(quantized: Callable[[], int]) -> None:
    m = model()
    eager = copy_of(m)
    m.compile_blocks()
    for count in (32, 48, 64, 32):
        x = tokens(count)
        assert sqnr(eager(x), m(x)) > FLOOR
    assert quantized() == 3 * LINEARS
    assert len(fp8_compile.report(m).graphs) == 2


def test_a_shared_weight_makes_one_constant(quantized: Callable[[], int]) -> None:
    m = model(2)
    m.blocks[1].to_q.weight = m.blocks[0].to_q.weight
    x = tokens()
    expected = m(x)
    m.compile_whole()
    assert sqnr(expected, m(x)) > FLOOR
    assert quantized() == 2 * LINEARS - 1
    layers = {row.path: row for row in fp8_compile.report(m).layers}
    assert layers["blocks.0.to_q"].decision == layers["blocks.1.to_q"].decision == "quantized"


def _in_place(m: Model) -> None:
    m.blocks[1].to_q.weight.mul_(-1.5)


def _load_state_dict(m: Model) -> None:
    m.load_state_dict(model().state_dict())


def _assign_state_dict(m: Model) -> None:
    m.load_state_dict(model().state_dict(), assign=True)


def _replace_parameter(m: Model) -> None:
    m.blocks[1].to_q.weight = nn.Parameter(m.blocks[1].to_q.weight * -1.5)


def _replace_layer(m: Model) -> None:
    m.blocks[1].to_q = model(1).blocks[0].to_q


def _swap_data(m: Model) -> None:
    m.blocks[1].to_q.weight.data = m.blocks[1].to_q.weight.data * -1.5


@pytest.mark.parametrize("compilation", ["blocks", "whole"])
@pytest.mark.parametrize(
    "edit", [_in_place, _load_state_dict, _assign_state_dict, _replace_parameter, _replace_layer, _swap_data]
)
def test_an_edit_is_seen_by_the_next_call(edit: Callable[[Model], None], compilation: str) -> None:
    m, x = model(), tokens()
    _ = m.compile_blocks() if compilation == "blocks" else m.compile_whole()
    before = m(x), m(x)
    edit(m)
    after = m(x)
    assert not torch.equal(before[0], after)
    assert torch.equal(after, fresh(m, x))
    assert torch.equal(after, m(x))


def test_an_edit_reaches_every_graph_that_shares_the_weight() -> None:
    m = model()
    m.compile_blocks()
    short, long = tokens(32), tokens(48)
    for _ in range(2):
        m(short), m(long)
    _in_place(m)
    outputs = m(short), m(long)  # the first call makes the constants anew, the second must not use older ones
    assert torch.equal(outputs[1], fresh(m, long))
    assert torch.equal(outputs[0], fresh(m, short))


def test_constants_keep_their_address_when_they_are_made_anew() -> None:
    m, x = model(1), tokens()
    m.compile_blocks()(x)
    weight = m.blocks[0].to_q.weight
    addresses = [t.data_ptr() for c in constants.STATES[weight].constants.values() for t in c.tensors]
    weight.mul_(2)
    m(x)
    assert addresses == [t.data_ptr() for c in constants.STATES[weight].constants.values() for t in c.tensors]


def test_offloaded_and_returned_parameters_are_not_quantized_again(quantized: Callable[[], int]) -> None:
    m, x = model(), tokens()
    m.compile_blocks()
    expected = m(x)
    quantized()
    for _ in range(3):
        held = [p.data.clone() for p in m.parameters()]
        for p, data in zip(m.parameters(), held, strict=True):
            p.data = data
        assert torch.equal(m(x), expected)
    assert quantized() == 0


@pytest.mark.parametrize("inference", [False, True])
def test_another_storage_at_the_first_address_is_seen(inference: bool) -> None:
    """As where ``.data`` is replaced twice between two calls: neither version nor address tells."""
    with torch.inference_mode() if inference else torch.no_grad():
        m = model(1)
        weight = m.blocks[0].to_q.weight
        memory = bytearray(weight.nbytes)

        def assign(values: Tensor) -> None:
            data = torch.frombuffer(memory, dtype=torch.bfloat16).view(WIDTH, WIDTH)
            weight.data = data.copy_(values)

        values = weight.clone()
        assign(values)
        m.compile_blocks()
        short, long = tokens(32), tokens(48)
        for _ in range(2):
            before = m(short), m(long)
        address = weight.data_ptr()
        weight.data = values * 3
        assign(values * -1.5)
        assert weight.data_ptr() == address
        after = m(short), m(long)  # of two graphs
        for old, new, x in zip(before, after, (short, long), strict=True):
            assert not torch.equal(old, new)
            assert torch.equal(new, fresh(m, x))


def test_a_storage_that_was_freed_is_not_kept() -> None:
    m = model(1)
    m.compile_blocks()
    m(tokens()), m(tokens())
    weight = m.blocks[0].to_q.weight
    held = weakref.ref(weight.untyped_storage())
    known = StorageWeakRef(weight.untyped_storage())
    weight.data = weight.data.clone()
    assert held() is None
    assert known.expired()


def _through_data(m: Model) -> None:
    m.blocks[2].to_k.weight.data.mul_(3)


def _through_the_storage(m: Model) -> None:
    weight = m.blocks[2].to_k.weight
    weight.untyped_storage().copy_((weight * 3).untyped_storage())


def _averaged(m: Model) -> None:
    from diffusers.training_utils import EMAModel

    average = EMAModel(m.parameters())
    m.blocks[2].to_k.weight.mul_(3)
    m(tokens())
    average.copy_to(m.parameters())


@pytest.mark.parametrize("edit", [_through_data, _through_the_storage, _averaged])
def test_a_hidden_edit_needs_refresh_and_refresh_says_what_changed(edit: Callable[[Model], None]) -> None:
    m, x = model(), tokens()
    m.compile_blocks()
    m(x), m(x)
    edit(m)
    assert not torch.equal(m(x), fresh(m, x))  # nothing on the host tells: what refresh is for
    assert fp8_compile.refresh(m) == ["blocks.2.to_k.weight"]
    assert torch.equal(m(x), fresh(m, x))
    assert fp8_compile.refresh(m) == []


def test_a_new_graph_compares_values_even_of_hidden_edits() -> None:
    m = model()
    m.compile_blocks()
    m(tokens(32))
    m.blocks[2].to_k.weight.data.mul_(3)
    x = tokens(48)
    assert torch.equal(m(x), fresh(m, x))


def test_a_deleted_model_frees_its_constants() -> None:
    m, x = model(), tokens()
    m.compile_blocks()(x)
    m(x)
    known = weakref.ref(constants.STATES[m.blocks[0].to_q.weight].constants.popitem()[1].tensors[0])
    # popitem took the store's own reference, so what is left is the compiled graph's.
    assert known() is not None
    tracked = len(constants.STATES)
    del m
    gc.collect()
    assert known() is None
    assert len(constants.STATES) <= tracked - 3 * LINEARS


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        m, x = model(), tokens()
        expected = m(x)
        m.compile_blocks()
        for _ in range(3):
            assert sqnr(expected, m(x)) > FLOOR
    x = x.clone()
    assert sqnr(expected, m(x)) > FLOOR


def test_constants_made_in_inference_mode_can_be_made_anew_outside() -> None:
    m, x = model(), tokens()
    m.compile_blocks()
    with torch.inference_mode():
        m(x), m(x)
    _in_place(m)
    assert torch.equal(m(x), fresh(m, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_without_a_scale_is_an_error_that_names_the_layer(value: float) -> None:
    m, x = model(), tokens()
    m.compile_blocks()
    m.blocks[1].img_mlp[2].weight[3, 5] = value
    with pytest.raises(fp8_compile.NonFiniteWeightError, match=r"blocks\.1\.img_mlp\.2") as error:
        m(x)
    assert error.value.layers == ("blocks.1.img_mlp.2",)
    m.blocks[1].img_mlp[2].weight[3, 5] = 0
    assert m(x).isfinite().all()


def test_the_price_in_memory_is_told_once_with_the_figure(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    gc.collect()
    monkeypatch.setattr(constants, "_announced_bytes", sum(s.nbytes for s in constants.STATES.values()))
    m, x = model(), tokens()
    m.compile_blocks()
    for _ in range(4):
        m(x)
    told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    expected = 3 * (2 * WIDTH * WIDTH + 8 * WIDTH * WIDTH + 4 * (2 * WIDTH + 4 * WIDTH + WIDTH))
    assert fp8_compile.report(m).totals["extra_bytes"] == expected
    assert f"{sum(s.nbytes for s in constants.STATES.values()) / 1e6:.1f} MB" in told[0]


def test_constants_are_static_inputs() -> None:
    """What CUDA graphs copy nothing of; the activation is the only input that is not static."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import TracingContext

    seen: list[tuple[int, list[int]]] = []

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((len(inputs), TracingContext.get().fw_metadata.static_input_indices))
        return make_boxed_func(gm.forward)

    m, x = model(1), tokens()
    m.compile_blocks(inner_backend=aot_autograd(fw_compiler=compiler))(x)
    ((count, static),) = seen
    assert len(static) == count - 1


def test_fake_weights_compile_and_run() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        m, x = Model(), tokens()
        for p in m.parameters():
            p.data = p.data.bfloat16()
        m.compile_blocks()
        for _ in range(2):
            out = m(x)
            assert (type(out), out.shape, out.dtype) == (type(x), x.shape, x.dtype)


def test_a_deep_copy_does_not_share_constants() -> None:
    m, x = model(), tokens()
    m.compile_blocks()
    before = m(x)
    other = copy.deepcopy(m)
    _in_place(other)
    assert torch.equal(m(x), before)
    assert torch.equal(torch.compile(other, backend="fp8_diffusion", options=OPTIONS)(x), fresh(other, x))


@pytest.mark.parametrize("factor", [-1.0, 0.5, 2.0, 4.0, 16.0])
def test_the_fingerprint_sees_signs_and_powers_of_two(factor: float) -> None:
    """Such an edit changes the same few bits of many words, which a sum without mixing lets cancel out."""
    weight = torch.randn(64, 256, dtype=torch.bfloat16)
    seen = {int(fingerprint(weight))}
    for column in range(256):
        edited = weight.clone()
        edited[:, column] *= factor
        seen.add(int(fingerprint(edited)))
    for pair in range(0, 256, 4):
        edited = weight.clone()
        edited[0, pair] *= factor
        edited[5, (pair + 4) % 256] *= factor
        seen.add(int(fingerprint(edited)))
    assert len(seen) == 1 + 256 + 64


def test_the_fingerprint_is_of_values_not_of_memory() -> None:
    weight = torch.randn(48, 32, dtype=torch.bfloat16)
    moved = torch.cat([torch.zeros(3, dtype=torch.bfloat16), weight.flatten()])[3:].view(48, 32)
    expected = int(fingerprint(weight))
    assert int(fingerprint(moved)) == expected
    assert int(fingerprint(weight.t().contiguous().t())) == expected
    assert int(fingerprint(weight.flip(0))) != expected


def test_a_sign_flip_is_seen_in_place_and_by_refresh() -> None:
    m, x = model(1), tokens()
    m.compile_blocks()
    m(x), m(x)
    m.blocks[0].to_q.weight[:, 3].mul_(-1)
    assert torch.equal(m(x), fresh(m, x))
    m.blocks[0].to_q.weight.data[:, 3::4].mul_(-1)
    assert fp8_compile.refresh(m) == ["blocks.0.to_q.weight"]
    assert torch.equal(m(x), fresh(m, x))


def test_reset_frees_the_constants_of_a_living_model() -> None:
    m, x = model(1), tokens()
    compiled = torch.compile(m, backend="fp8_diffusion", options=OPTIONS)
    expected = compiled(x)
    torch.compiler.reset()
    assert fp8_compile.report(m).totals["extra_bytes"] == 0
    assert torch.equal(compiled(x), expected)
    assert len(fp8_compile.report(m).graphs) == 1


@pytest.mark.parametrize("fullgraph", [False, True])
def test_several_threads(fullgraph: bool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    if fullgraph and torch.torch_version.TorchVersion(torch.__version__) < "2.13":
        # https://github.com/pytorch/pytorch/pull/185138
        pytest.skip("torch keeps the state of fullgraph for all threads, and compiles no hooked block afterwards")

    def compiled(m: Model) -> Model:
        for block in m.blocks:
            block.compile(backend="fp8_diffusion", fullgraph=fullgraph, options=OPTIONS)
        return m

    m, x = compiled(model()), tokens()
    expected = m(x)
    in_fp8 = fp8_compile.report(m).totals["quantized"]
    assert in_fp8

    def use(_: int) -> bool:
        with torch.no_grad():
            other = compiled(copy_of(m))
            same = all(torch.equal(expected, f(x)) for f in (m, other, other))
            return same and fp8_compile.report(other).totals["quantized"] == in_fp8

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(8)))


@pytest.mark.parametrize("reset", [torch.compiler.reset, torch._dynamo.reset])
def test_constants_die_with_the_graphs_though_the_model_lives(reset: Callable[[], None]) -> None:
    m, x = model(), tokens()
    compiled = torch.compile(m, backend="fp8_diffusion", options=OPTIONS)
    compiled(x), compiled(x)
    made = [weakref.ref(t) for s in constants.STATES.values() for c in s.constants.values() for t in c.tensors]
    assert len(made) >= 2 * 3 * LINEARS
    del compiled
    reset()
    gc.collect()
    assert [ref() for ref in made if ref() is not None] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_forked_while_another_thread_holds_the_lock() -> None:
    m, x = model(1).compile_blocks(), tokens()
    m(x)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with constants.LOCK:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    pid = os.fork()
    if pid == 0:  # the thread is not there any more
        os._exit(0 if constants.LOCK.acquire(timeout=5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    done.set()
    thread.join()
