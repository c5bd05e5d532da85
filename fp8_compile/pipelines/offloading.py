"""Where weights wait that the device has no memory for: ways of diffusers' by name."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import OptionError
from .denoisers import PipelineError

OFFLOADING = ("model", "group", "sequential")
"""Whole models, which is the fastest; layers by diffusers' hooks; or by accelerate's, which needs the least memory."""


def check_offload(name: str, device: str) -> None:
    """Refuse what would save nothing.

    Raises:
        OptionError: there is no such way, or nothing to bring the weights to.
    """
    if name not in OFFLOADING:
        raise OptionError(f"offload={name!r} is not valid; valid: {', '.join(OFFLOADING)}")
    if torch.device(device).type == "cpu":
        raise OptionError(f"offload={name!r}: weights are kept in the CPU's memory, and device={device!r} is there")


def offload(name: str, pipe: Any, device: str) -> None:
    """Leave the weights of ``pipe`` on the CPU, and bring them to ``device`` for their use.

    Raises:
        PipelineError: the pipeline cannot be offloaded so.
    """
    try:
        if name == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif name == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
    except (ValueError, ImportError) as error:
        raise PipelineError(f"offload={name!r}: {type(pipe).__name__} cannot have it: {error}") from error
