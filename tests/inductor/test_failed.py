"""What a backend leaves behind when it raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

import fp8_compile
from fp8_compile.inductor.failed import forgets_guards
from tests.support.blocks import LOAD, model, tokens


def refuses(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
    raise ValueError("no")


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "invalidate_compile_context_weakrefs"),
    reason="this torch keeps other weak references, too, until the exception dies",
)
@pytest.mark.parametrize("decorated", [False, True])
def test_a_model_can_be_moved_while_the_exception_lives(decorated: bool) -> None:
    m = model(1)
    fp8_compile.quantize_(m, LOAD)
    backend = forgets_guards(refuses) if decorated else refuses
    with torch.no_grad(), torch._dynamo.config.patch(invalidate_compile_context_weakrefs=True):
        compiled = torch.compile(m, backend=backend)
        with pytest.raises(BackendCompilerFailed) as held:
            compiled(tokens())
    assert isinstance(held.value.inner_exception, ValueError)
    if decorated:
        assert m.to("cpu") is m
    else:  # or else there is nothing to mend
        with pytest.raises(RuntimeError, match="swap"):
            m.to("cpu")


def test_a_backend_may_be_called_without_dynamo() -> None:
    with pytest.raises(ValueError, match="no"):
        forgets_guards(refuses)(None, ())  # type: ignore[arg-type]
