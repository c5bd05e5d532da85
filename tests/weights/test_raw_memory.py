"""A wrapper subclass has no memory of its own: who reads or shares that gets the constants, or an error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fp8_compile
from fp8_compile import QuantizedWeight, QuantizedWeightError
from fp8_compile.schemes.fp8 import Fp8


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def weight(dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    return QuantizedWeight(QuantizedWeight.quantize(torch.randn(64, 64, dtype=dtype), Fp8()))


MADE: dict[str, Callable[[QuantizedWeight], Any]] = {
    "as it is": lambda w: w,
    "detached": lambda w: w.detach(),
    "moved": lambda w: w.to(torch.bfloat16).to(torch.float32),
    "copied": copy.deepcopy,
    "unpickled": lambda w: pickle.loads(pickle.dumps(w)),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("read", [np.from_dlpack, torch.from_dlpack])
def test_no_exchange_of_memory_that_it_has_not(made: str, read: Callable[[Any], Any]) -> None:
    with pytest.raises(QuantizedWeightError, match="dequantize"):
        read(MADE[made](weight()))


READS: dict[str, Callable[[QuantizedWeight], Any]] = {
    "to_dlpack": torch.utils.dlpack.to_dlpack,
    "Tensor.data_ptr": torch.Tensor.data_ptr,
    "storage copied into": lambda w: w.untyped_storage().copy_(torch.randn(64, 64).untyped_storage()),
    "storage copied": lambda w: w.untyped_storage().clone(),
    "storage filled": lambda w: w.untyped_storage().fill_(0),
    "storage freed": lambda w: w.untyped_storage().resize_(0),
    "numpy": lambda w: w.numpy(),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("read", READS)
def test_torch_refuses_to_read_it(made: str, read: str) -> None:
    """These never reach a method of ours; they ended the process, or read what is at address 0."""
    with pytest.raises(RuntimeError):
        READS[read](MADE[made](weight()))


def test_a_model_in_shared_memory_is_shared_with_who_receives_it() -> None:
    m = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    fp8_compile.quantize_(m, {"min_features": 16})
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    expected = m(x)
    assert not m[0].weight.is_shared()
    m.share_memory()
    assert m[0].weight.is_shared()
    assert torch.equal(m(x), expected)
    received = pickle.loads(ForkingPickler.dumps(m[0].weight))
    assert isinstance(received, QuantizedWeight)
    m[0].weight.mul_(-1)
    assert torch.equal(received.dequantize(), m[0].weight.dequantize())


def test_what_stands_for_an_address_tells_weights_apart_and_is_none() -> None:
    """accelerate finds tied weights by it."""
    first, second = weight(), weight()
    assert first.data_ptr() == first.detach().data_ptr() != second.data_ptr()
    assert first.data_ptr() < 0
    assert first.to("meta").data_ptr() == 0
