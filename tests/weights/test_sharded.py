"""Weights and torch.distributed: FSDP's are left alone, and quantized ones are neither sharded nor written into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fp8_compile
from fp8_compile import QuantizedWeight, QuantizedWeightError
from fp8_compile.weights import sharded
from tests.support.blocks import LOAD, OPTIONS, WIDTH, Model, model, tokens
from tests.support.sqnr import sqnr

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def mesh(tmp_path: Path) -> Iterator[Any]:
    """Of one process: what is asked here does not depend on how many there are."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    with torch.no_grad():
        yield torch.distributed.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def converted() -> Any:
    m = model(1).requires_grad_(False)
    fp8_compile.quantize_(m, LOAD)
    return m


SHARD: dict[str, Callable[[Any, Any], Any]] = {
    "fully_shard": lambda m, mesh: fully_shard(m, mesh=mesh),
    "fully_shard of a block": lambda m, mesh: fully_shard(m.blocks[0], mesh=mesh),
    "FSDP1": lambda m, mesh: FullyShardedDataParallel(m, device_id=CPU),
    "distribute_tensor": lambda m, mesh: distribute_tensor(m.blocks[0].to_q.weight, mesh, [Shard(0)]),
    "replicated": lambda m, mesh: distribute_tensor(m.blocks[0].to_q.weight, mesh, [Replicate()]),
    "distribute_module": distribute_module,
    "tensor parallel": lambda m, mesh: parallelize_module(m, mesh, {"blocks.0.to_q": ColwiseParallel()}),
}


@pytest.mark.parametrize("how", SHARD)
def test_quantized_weights_are_not_sharded_in_silence(how: str, mesh: Any) -> None:
    """The shards held their values in BF16: twice the memory, and FP8's error all the same."""
    with pytest.raises(QuantizedWeightError):
        SHARD[how](converted(), mesh)


@pytest.mark.parametrize("how", SHARD)
def test_plain_weights_are(how: str, mesh: Any) -> None:
    SHARD[how](model(1).requires_grad_(False), mesh)


def test_a_model_is_sharded_around_quantized_weights(mesh: Any) -> None:
    m, x = converted(), tokens()
    expected = m(x)
    ignored = {p for p in m.parameters() if isinstance(p, QuantizedWeight)}
    assert len(ignored) == 4
    fully_shard(m, mesh=mesh, ignored_params=ignored)
    assert torch.equal(m(x), expected)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "broadcast": lambda w, new: dist.broadcast(w, 0),
    "broadcast into .data": lambda w, new: dist.broadcast(w.data, 0),
    "broadcast in the background": lambda w, new: dist.broadcast(w, 0, async_op=True),
    "all_reduce": lambda w, new: dist.all_reduce(w),
    "reduce": lambda w, new: dist.reduce(w, 0),
    "scatter": lambda w, new: dist.scatter(w, [new]),
    "all_gather_into_tensor": dist.all_gather_into_tensor,
    "reduce_scatter_tensor": dist.reduce_scatter_tensor,
    "all_to_all_single": dist.all_to_all_single,
    "irecv": lambda w, new: dist.irecv(w, 0),
    "functional": lambda w, new: torch.ops._c10d_functional.all_reduce_(w, "sum", dist.group.WORLD.group_name),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_a_collective_writes_into_a_quantized_weight_is_not_lost_in_silence(name: str) -> None:
    w = converted().blocks[0].to_q.weight
    with pytest.raises(QuantizedWeightError, match="plain tensor"):
        WRITES[name](w, torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16))


def test_collectives_may_read_quantized_weights_and_copy_into_them() -> None:
    w, new = converted().blocks[0].to_q.weight, torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16)
    dist.all_gather([new], w)
    assert torch.equal(new, w.dequantize())
    new.fill_(3)
    dist.all_gather([w], new)  # gathers into memory of its own, and copies
    assert torch.equal(w.dequantize(), new)


def test_a_collective_into_a_plain_weight_needs_refresh() -> None:
    m, x = model(1), tokens()
    m.compile_blocks()
    for _ in range(2):
        before = m(x)
    weight = m.blocks[0].to_q.weight
    dist.scatter(weight, [weight * -1.5])
    assert torch.equal(m(x), before)  # nothing on the host tells: what refresh is for
    assert fp8_compile.refresh(m) == ["blocks.0.to_q.weight"]
    assert not torch.equal(m(x), before)


COMPILE: dict[str, Callable[[Model], Any]] = {
    "blocks": lambda m: m.compile_blocks() and m,
    "whole": lambda m: torch.compile(m, backend="fp8_diffusion", options=OPTIONS),
    "inlined": lambda m: torch.compile(lambda x: m(x), backend="fp8_diffusion", options=OPTIONS),
}


@pytest.mark.parametrize("first", ["shard", "compile"])
@pytest.mark.parametrize("compilation", COMPILE)
def test_weights_that_fsdp2_refills_stay(compilation: str, first: str, mesh: Any) -> None:
    """It fills the same parameters at the same addresses with new values, and no version tells."""
    m, reference, x = model(2), model(2), tokens()
    reference.load_state_dict(m.state_dict())

    def shard() -> None:
        for block in m.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(m, mesh=mesh)

    if first == "shard":
        shard()
    run = COMPILE[compilation](m)
    if first == "compile":
        shard()
    for factor in (1.0, 1.0, -2.0, 0.5, -1.0):
        for p in (*m.parameters(), *reference.parameters()):
            getattr(p, "_local_tensor", p).mul_(factor)
        assert torch.equal(run(x), reference(x))


def test_the_report_says_why_and_strict_is_an_error(mesh: Any) -> None:
    m, x = model(1), tokens()
    fully_shard(m, mesh=mesh)
    torch.compile(m, backend="fp8_diffusion", options=OPTIONS)(x)
    assert {row.reason for row in fp8_compile.report(m).layers} == {"refilled by FSDP2"}
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match="refilled by FSDP2") as error:
        torch.compile(m, backend="fp8_diffusion", options={**OPTIONS, "strict": True})(x)
    assert isinstance(error.value.inner_exception, fp8_compile.NothingConvertedError)


def test_other_models_are_converted_while_fsdp_is_in_use() -> None:
    m = model(1)
    torch.compile(m, backend="fp8_diffusion", options=OPTIONS)(tokens())
    assert fp8_compile.report(m).totals["quantized"] == 4


def test_fsdp1_and_fsdp2_refill_what_they_shard(mesh: Any) -> None:
    layer = nn.Linear(4, 4)
    assert sharded.refilled([nn.Sequential(layer), layer]) is None
    assert sharded.refilled([FullyShardedDataParallel(nn.Linear(4, 4), device_id=CPU)]) == "refilled by FSDP"
    assert sharded.refilled([fully_shard(nn.Sequential(layer), mesh=mesh), layer]) == "refilled by FSDP2"


def test_a_block_that_is_sharded_stays_among_others(mesh: Any) -> None:
    m, x = model(2), tokens()
    m.compile_blocks()(x)
    fully_shard(m.blocks[0], mesh=mesh)
    m(x)
    m(x)
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert {rows[f"blocks.1.{name}"].decision for name in ("to_q", "to_k", "img_mlp.0", "img_mlp.2")} == {"quantized"}


def test_diffusers_refuses_tensor_parallelism_over_quantized_weights() -> None:
    """In its own words, since it is told that the model is quantized, and before it asks for accelerators."""
    from diffusers import TensorParallelConfig

    from bench.tiny import build_qwen_image

    transformer = build_qwen_image().transformer.requires_grad_(False)
    fp8_compile.quantize_(transformer, LOAD)
    with pytest.raises(ValueError, match="Load the model unquantized to shard it"):
        transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=1))


def test_weights_that_tensor_parallelism_has_sharded_stay_and_the_others_are_converted(mesh: Any) -> None:
    m, x = model(1).requires_grad_(False), tokens()
    expected = m(x)
    parallelize_module(m, mesh, {"blocks.0.img_mlp.0": ColwiseParallel(), "blocks.0.img_mlp.2": RowwiseParallel()})
    m.compile_blocks()
    assert sqnr(expected, m(x)) > 25
    reasons = {row.path: (row.decision, row.reason) for row in fp8_compile.report(m).layers}
    assert reasons == {
        "blocks.0.to_q": ("quantized", ""),
        "blocks.0.to_k": ("quantized", ""),
        "blocks.0.img_mlp.0": ("unquantized", "weight is a DTensor"),
        "blocks.0.img_mlp.2": ("unquantized", "weight is a DTensor"),
    }
