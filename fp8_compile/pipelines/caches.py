"""diffusers' step caches by name: a step that would change little reuses what an earlier one has computed.

A cache's state is that of one picture, so with one pictures are drawn alone, and it is reset before each.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import OptionError
from .denoisers import PipelineError

CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "first-block": ("FirstBlockCacheConfig", {}),
    "pyramid": ("PyramidAttentionBroadcastConfig", {"spatial_attention_block_skip_range": 2}),
    "sea": ("SeaCacheConfig", {}),
    "taylorseer": ("TaylorSeerCacheConfig", {}),
    "taylorseer-lite": ("TaylorSeerCacheConfig", {"use_lite_mode": True}),
    "text-kv": ("TextKVCacheConfig", {}),
}
"""The config of each in diffusers, and what it is given beside its defaults."""

LEFT_OUT = {
    "mag": "it needs ratios that were measured with one checkpoint and one number of steps, and keeps torch.compile "
    "out of the blocks",
    "faster": "it has to be told, for each pipeline, the layout of the latents and the arguments that hold both halves "
    "of a guided batch",
    "cache-dit": "it has to be told whether a call guides; call cache_dit.enable_cache in Python",
}
"""Caches of diffusers that cannot be had by name, and why."""


def check_cache(name: str) -> None:
    """Refuse a name that no cache has.

    Raises:
        OptionError: it is none of `CACHES`.
    """
    if name in LEFT_OUT:
        raise OptionError(f"cache={name!r} is not offered: {LEFT_OUT[name]}; valid: {', '.join(CACHES)}")
    if name not in CACHES:
        raise OptionError(f"cache={name!r} is not valid; valid: {', '.join(CACHES)}")


def enable_cache(name: str, pipe: Any, denoisers: Mapping[str, nn.Module]) -> None:
    """Give the denoisers of ``pipe`` a cache, before they are compiled.

    Args:
        name: a key of `CACHES`.

    Raises:
        PipelineError: they cannot have it, or it would do nothing.
    """
    pipeline = type(pipe).__name__
    if name == "pyramid" and not hasattr(type(pipe), "current_timestep"):
        raise PipelineError(f"cache={name!r}: {pipeline} does not tell its current timestep")
    # All but two ask for it at the first step. Whether a pipeline sets it, only its source tells.
    if name not in ("pyramid", "text-kv") and "cache_context" not in inspect.getsource(type(pipe).__call__):
        raise PipelineError(f"cache={name!r}: {pipeline} tells its transformer nothing of the steps (no cache_context)")
    from diffusers import hooks

    config_name, given = CACHES[name]
    if name == "pyramid":
        given = {**given, "current_timestep_callback": lambda: pipe.current_timestep}
    config = getattr(hooks, config_name)(**given)
    for module in denoisers.values():
        kind = type(module).__name__
        if not hasattr(module, "enable_cache"):
            raise PipelineError(f"cache={name!r}: {kind} can have no step cache")
        before = _hooks(module)
        enable: Any = module.enable_cache
        try:
            enable(config)
        except (ValueError, IndexError) as error:  # diffusers does not know its blocks, or found none
            raise PipelineError(f"cache={name!r}: {kind} cannot have it: {error}") from error
        if _hooks(module) == before:
            raise PipelineError(f"cache={name!r}: it finds none of its layers in {kind}, so it would do nothing")


def reset_caches(denoisers: Mapping[str, nn.Module]) -> None:
    """Forget the steps of an earlier picture. diffusers does so after each call, but not after one that failed."""
    from diffusers.hooks.hooks import HookRegistry

    for module in denoisers.values():
        HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks()


def _hooks(module: nn.Module) -> int:
    """How many hooks of diffusers are in the parts of ``module``, itself not counted."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules() if part is not module)
    return sum(len(registry.hooks) for registry in registries if registry is not None)
