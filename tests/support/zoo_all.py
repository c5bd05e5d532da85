"""All transformer classes of the installed diffusers, each tiny, and what becomes of them."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import diffusers.models.transformers as package
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fp8_compile
from tests.support.sqnr import sqnr
from tests.support.zoo import MODELS, Inputs
from tests.support.zoo_more import SAMPLES, Sample


@functools.cache
def classes() -> dict[str, type[nn.Module]]:
    """All models in `diffusers.models.transformers`, by name. Imports all of it."""
    return {
        name: member
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        for name, member in vars(importlib.import_module(found.name)).items()
        if inspect.isclass(member) and issubclass(member, diffusers.ModelMixin) and member.__module__ == found.name
    }


_OF_OLD = {
    tiny.class_name: Sample(tiny.config, lambda tiny=tiny: tiny.inputs(0), tiny.blocks) for tiny in MODELS.values()
}
ZOO: dict[str, Sample] = {**SAMPLES, **_OF_OLD}


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = classes()[name](**ZOO[name].config)
        for parameter in model.parameters():
            # Zero-initialised layers would hide everything computed before them, and experts hold what the memory held.
            if parameter.dim() == 3 or not parameter.any() or not parameter.isfinite().all():
                nn.init.normal_(parameter, std=0.02)
    model.bfloat16()
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for path, parameter in model.named_parameters():
        if any(part in kept for part in path.split(".")):  # as from_pretrained does
            parameter.data = parameter.data.float()
    return model.eval()


def inputs(name: str) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = ZOO[name].make_inputs()
    dict_asked = "return_dict" in inspect.signature(classes()[name].forward).parameters
    return {**made, "return_dict": False} if dict_asked else made


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    with torch.no_grad():
        result = model(**inputs(name))
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


OPTIONS: dict[str, Any] = {"min_features": 64}


@dataclass(frozen=True)
class Measured:
    """What one class made of one way to compile it.

    Attributes:
        fullgraph: stock compiles it in one graph per call.
        stock_graphs: how many graphs stock makes with "aot_eager".
        graphs: how many this backend makes of the same.
        linears: how many the class has.
        sqnr: in dB, against the model without compilation; of the worst of its outputs.
        same_bits: converting before compiling gives the same bits as converting by it.
        report: of the model that was converted by compiling.
    """

    fullgraph: bool
    stock_graphs: int
    graphs: int
    linears: int
    sqnr: float
    same_bits: bool
    report: fp8_compile.Report


def parts(model: nn.Module, name: str, by_blocks: bool) -> list[nn.Module]:
    """The modules to compile: the model, or its blocks."""
    if not by_blocks:
        return [model]
    classes = tuple(getattr(model, "_repeated_blocks", None) or ()) or ZOO[name].blocks
    if classes:
        return [module for module in model.modules() if type(module).__name__ in classes]
    return [block for blocks in model.children() if isinstance(blocks, nn.ModuleList) for block in blocks]


def _compiled(
    name: str, by_blocks: bool, fullgraph: bool, before: Mapping[str, Any] | None = None, **arguments: Any
) -> tuple[nn.Module, list[Tensor]]:
    """The model with its parts compiled, and converted by the options ``before`` if given, and what it computes."""
    torch.compiler.reset()
    model = build(name)
    for part in parts(model, name, by_blocks):
        if before is not None:
            fp8_compile.quantize_(part, before)
        part.compile(fullgraph=fullgraph, **arguments)
    with torch._dynamo.config.patch(recompile_limit=64):
        return model, outputs(model, name)


def measure(name: str, by_blocks: bool) -> Measured:
    """Compile the class by stock torch and by this backend, and compare.

    Raises:
        Exception: of stock, where it cannot compile the class even with fullgraph=False.
    """
    expected = outputs(build(name), name)
    fullgraph, stock = True, CompileCounterWithBackend("aot_eager")
    try:
        _compiled(name, by_blocks, True, backend=stock)
    except torch._dynamo.exc.TorchDynamoException:
        fullgraph, stock = False, CompileCounterWithBackend("aot_eager")
        _compiled(name, by_blocks, False, backend=stock)
    ours = CompileCounterWithBackend("aot_eager")
    options = {**OPTIONS, "inner_backend": ours}
    model, computed = _compiled(name, by_blocks, fullgraph, backend="fp8_diffusion", options=options)
    graphs = ours.frame_count
    report = fp8_compile.report(model)
    one = computed
    apart = ZOO[name].apart_in_blocks if by_blocks else ZOO[name].apart
    if apart:
        options["ignored_layers"] = list(apart)
        _, one = _compiled(name, by_blocks, fullgraph, backend="fp8_diffusion", options=options)
    _, other = _compiled(name, by_blocks, fullgraph, options, backend="fp8_diffusion", options=options)
    torch.compiler.reset()
    return Measured(
        fullgraph,
        stock.frame_count,
        graphs,
        sum(isinstance(module, nn.Linear) for module in model.modules()),
        min(map(sqnr, expected, computed)),
        all(map(torch.equal, one, other)),
        report,
    )
