"""The modules of a pipeline that run at every step: which they are, and their blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import Fp8Error
from ..weights.quantized_weight import QuantizedWeight

DENOISERS = ("transformer", "transformer_2", "unet")
"""What a pipeline calls the modules that run at every step."""


class PipelineError(Fp8Error, ValueError):
    """A pipeline that has nothing to compile, or that cannot be measured."""


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The modules of ``pipeline`` that run at every step, by their names in it.

    Raises:
        PipelineError: it has none of `DENOISERS`.
    """
    found = {name: module for name in DENOISERS if (module := getattr(pipeline, name, None)) is not None}
    if not found:
        raise PipelineError(f"{type(pipeline).__name__} has none of {', '.join(DENOISERS)}: nothing to compile")
    return found


def repeated_blocks(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of the blocks that ``compile_repeated_blocks`` compiles; none where the model names no kind."""
    kinds = getattr(denoiser, "_repeated_blocks", None) or ()
    return [(path, module) for path, module in denoiser.named_modules() if type(module).__name__ in kinds]


def has_fp8_weights(model: nn.Module) -> bool:
    """Whether a weight of ``model`` was converted at load time."""
    return any(isinstance(parameter, QuantizedWeight) for parameter in model.parameters())


def mark_steps(denoisers: Iterable[nn.Module]) -> list[Any]:
    """Hooks that tell CUDA graphs of every call of these modules, whose blocks are compiled one by one.

    Without them each block begins a new iteration, which frees the result of the block before it. A module that is
    compiled as a whole needs none, and could not have one: the hook would be compiled with it.
    """

    def mark(*_: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    return [module.register_forward_pre_hook(mark) for module in denoisers]
