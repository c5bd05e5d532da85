"""Who activates FlashAttention 3, says so, and takes it back. Its kernels are on no CPU: a stand-in is registered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import _registry

from fp8_compile.attention import flash3
from fp8_compile.attention.kernel import Question

attention: Any = torch.nn.attention
QUESTION = Question(torch.device("cuda"), (9, 0), 128, 128, inductor=False)


class Handle:
    active = 0

    def __init__(self) -> None:
        Handle.active += 1

    def remove(self) -> None:
        Handle.active -= 1


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", Handle)
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", Handle)
    monkeypatch.setattr(flash3, "PACKAGE", "torch")
    yield
    flash3.restore()
    attention.restore_flash_attention_impl(_raise_warn=False)
    assert Handle.active == 0


def test_it_is_activated_once_and_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    assert flash3.reason(QUESTION) is None
    assert attention.current_flash_attention_impl() is None  # asking activates nothing
    assert flash3.activate() == flash3.activate() == flash3.ACTIVE
    assert (Handle.active, attention.current_flash_attention_impl()) == (1, "FA3")
    assert flash3.ACTIVE in caplog.text
    flash3.restore()
    flash3.restore()
    assert (Handle.active, attention.current_flash_attention_impl()) == (0, None)


def test_what_the_user_has_activated_stays() -> None:
    attention.activate_flash_attention_impl("FA3")
    assert flash3.activate() == flash3.ACTIVE
    flash3.restore()
    assert attention.current_flash_attention_impl() == "FA3"
    attention.activate_flash_attention_impl("FA4")
    assert flash3.reason(QUESTION) == "torch.nn.attention has FA4 active, which FlashAttention 3 would replace"
