"""The pytest plugin of `bench.peers`: what it changes in diffusers' own tests so that they run on a CPU, in BF16.

`bench.peers` gives it PEERS_RUN ("stock", "ours" or "converted"), PEERS_INNER (the inner backend) and PEERS_OUTPUT
(a file, which gets one JSON line per test).
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import nn

import fp8_compile

RUN, INNER = os.environ["PEERS_RUN"], os.environ["PEERS_INNER"]
WEIGHTS = {"min_features": 16}
"""The models are tiny. Whatever FP8 matrices can be made of shall become FP8."""

LEFT_OUT = {
    "test_compile_works_with_aot": "exports the model: torch.compile has no part in it",
    "conv2d": "is for UNets",
}
"""Parts of tests' names, and why they are not run."""

MADE = pytest.StashKey[list[nn.Module]]()
"""The models that a test made."""

_compile = torch.compile


def _compile_with(*args: Any, **settings: Any) -> Any:
    if settings.get("backend", "inductor") == "inductor":
        if INNER != "inductor":  # whose modes others do not have
            settings.pop("mode", None)
        settings["backend"] = INNER
        if RUN != "stock":
            own = {**(WEIGHTS if RUN == "ours" else {}), "inner_backend": INNER}
            settings |= {"backend": "fp8_diffusion", "options": own}
    return _compile(*args, **settings)


torch.compile = _compile_with


def cast(value: Any) -> Any:
    """Floats in BF16, in containers too: what a pipeline in BF16 gives its transformer."""
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.dtype == torch.float32 else value
    if isinstance(value, dict):
        return {key: cast(item) for key, item in value.items()}
    return type(value)(map(cast, value)) if isinstance(value, (list, tuple)) else value


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    """With more heads where the model would be too narrow: sizes of FP8 matrices are multiples of 16."""
    heads, size = arguments.get("num_attention_heads"), arguments.get("attention_head_dim")
    return (
        arguments
        if heads is None or size is None
        else {**arguments, "num_attention_heads": math.lcm(heads * size, 16) // size}
    )


def to_bf16(model: nn.Module) -> None:
    """As ``from_pretrained(dtype=torch.bfloat16)`` does, which leaves some modules in float32."""
    kept = model._keep_in_fp32_modules or ()
    for path, module in model.named_modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.dtype == torch.float32 and not {*path.split("."), leaf} & {*kept}:
                setattr(module, leaf, nn.Parameter(cast(tensor)) if leaf in module._parameters else cast(tensor))


def only_of_list(_: nn.Module, __: Any, output: Any) -> Any:
    """Z-Image returns a list of pictures, and these tests want a tensor."""
    return (output[0][0],) if isinstance(output, tuple) and isinstance(output[0], list) else output


def pytest_collection() -> None:
    """Before the test modules are imported, whose decorators ask for an accelerator."""
    utils = sys.modules["tests.testing_utils"]
    utils.require_accelerator = utils.require_torch_accelerator = lambda test: test


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: Any, obj: Any) -> Any:
    """Beside each class of tests of a model, ours of the same model."""
    found = yield
    if not isinstance(found, pytest.Class):
        return found
    from . import peers_mixins  # imports diffusers' mixins

    further = peers_mixins.further(obj, collector.obj)
    for name, kind in further.items():
        setattr(collector.obj, name, kind)
    return [found, *(pytest.Class.from_parent(collector, name=name) for name in further)]


def _offload(self: Any, **settings: Any) -> None:
    """Group offloading from the CPU to the CPU, which has no streams."""
    with mock.patch("torch.accelerator.current_accelerator", return_value=torch.device("cpu")):
        _enable_group_offload(self, **{**settings, "use_stream": False, "non_blocking": False})


_enable_group_offload = diffusers.ModelMixin.enable_group_offload
diffusers.ModelMixin.enable_group_offload = _offload


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from . import peers_mixins

    parts = {None, "quantization"} if RUN == "converted" else {None}
    wanted = [item for item in items if peers_mixins.part(item.cls) not in parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
    for item in items:
        for name, reason in LEFT_OUT.items():
            if name in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _in_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models in BF16, or FP8, as they are made; inputs too; and a count of the layers that did become FP8."""
    from . import peers_mixins

    test, kind = request.instance, request.instance.model_class
    part = peers_mixins.part(request.cls)
    made, initialise, inputs, arguments = [], kind.__init__, test.get_dummy_inputs, test.get_init_dict

    @functools.wraps(initialise)
    def init(model: Any, *args: Any, **kwargs: Any) -> None:
        initialise(model, *args, **kwargs)
        if part == "quantization":
            model.register_forward_hook(only_of_list)
        else:
            to_bf16(model)
            if RUN == "converted":
                fp8_compile.quantize_(model, WEIGHTS)
        made.append(model)

    monkeypatch.setattr(kind, "__init__", init)
    monkeypatch.setattr(test, "get_init_dict", lambda: widened(arguments()))
    monkeypatch.setattr(test, "get_dummy_inputs", lambda *args, **kwargs: cast(inputs(*args, **kwargs)))
    request.node.stash[MADE] = made
    yield
    made.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        from . import peers_mixins

        reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        if call.excinfo is not None and not reason:
            reason = f"{call.excinfo.typename}: {str(call.excinfo.value)[:2000]}"
        record = {
            "test": item.nodeid.split("test_models_")[-1].removeprefix("transformer_"),
            "part": peers_mixins.part(item.cls),
            "outcome": report.outcome,
            "in_fp8": max((fp8_compile.report(m).totals["quantized"] for m in item.stash.get(MADE, [])), default=0),
            "reason": reason,
            "seconds": round(report.duration, 1),
        }
        with Path(os.environ["PEERS_OUTPUT"]).open("a") as file:
            file.write(json.dumps(record) + "\n")
    return report
