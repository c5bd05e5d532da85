"""Which layers to keep out of FP8: the choices that an ablation compares, and what others recommend.

Patterns are those of `fp8_compile.patterns`. Where a recommendation comes from, and what was measured, is in
``docs/models.md``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import Fp8Error, PatternError
from ..patterns import Pattern
from ..pipelines.denoisers import repeated_blocks

Groups = dict[str, tuple[str, ...]]
"""``ignored_layers`` by the name of the choice."""

_TEXT_KV, _TEXT_OUT, _QKV, _OUT = "add_kv_proj", "to_add_out", "to_qkv", "attn.to_out"

QWEN_IMAGE_GROUPS: Groups = {
    "all FP8": (),
    "skip text KV": (_TEXT_KV,),
    "skip text out": (_TEXT_OUT,),
    "skip text KV + out": (_TEXT_KV, _TEXT_OUT),
    "skip image QKV": (_QKV,),
    "skip image out": (_OUT,),
    "skip image QKV + out": (_QKV, _OUT),
    "skip img_mlp": ("img_mlp",),
    "skip txt_mlp": ("txt_mlp",),
    "skip both MLPs": ("img_mlp", "txt_mlp"),
    "skip all attention": (_QKV, _TEXT_KV, _OUT, _TEXT_OUT),
    "skip text stream": (_TEXT_KV, _TEXT_OUT, "txt_mlp"),
    "skip attention + txt_mlp": (_QKV, _TEXT_KV, _OUT, _TEXT_OUT, "txt_mlp"),
}
"""With compiled BF16, the 14 configurations of Qwen-Image that an ablation compares."""

RECOMMENDED: Groups = {"QwenImageTransformer2DModel": ("img_mlp",)}
"""What others recommend to keep, by the class of the transformer; classes without an entry: nothing."""


class GroupsError(Fp8Error, ValueError):
    """A file of groups that cannot be read, or does not map names to lists of patterns."""


def groups_for(denoiser: nn.Module) -> Groups:
    """The choices to compare for a model: `QWEN_IMAGE_GROUPS`, or for another class one per part of its blocks.

    Args:
        denoiser: a diffusers transformer or UNet. Parts are the children of its repeated blocks (of the model itself,
            if it names none) that hold linears.
    """
    if type(denoiser).__name__ == "QwenImageTransformer2DModel":
        return dict(QWEN_IMAGE_GROUPS)
    blocks = [block for _, block in repeated_blocks(denoiser)] or [denoiser]
    parts = {
        name: None
        for block in blocks
        for name, child in block.named_children()
        if any(isinstance(module, nn.Linear) for module in child.modules())
    }
    return {"all FP8": (), **{f"skip {name}": (name,) for name in parts}}


def read_groups(path: str | os.PathLike[str]) -> Groups:
    """Read groups from a ``.json`` or ``.toml`` file that maps each name to a list of patterns.

    Raises:
        GroupsError: it cannot be read, or holds something else; the message names the entry.
        PatternError: a pattern is malformed.
    """
    path = Path(path)
    parsers: Mapping[str, Callable[[str], Any]] = {
        ".json": functools.partial(json.loads, object_pairs_hook=_without_repetition),
        ".toml": _toml().loads,
    }
    if path.suffix not in parsers:
        raise GroupsError(f"{str(path)!r}: groups are read from {' and '.join(parsers)} files")
    try:
        groups = parsers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # both parsers raise kinds of ValueError
        raise GroupsError(f"{str(path)!r}: {error}") from error
    if not isinstance(groups, dict) or not groups:
        raise GroupsError(f"{str(path)!r}: a table of names and lists of patterns belongs here, and at least one")
    for name, patterns in groups.items():
        if not isinstance(patterns, list):
            raise GroupsError(f"{str(path)!r}: {name!r} is {patterns!r}; a list of patterns belongs here")
        try:
            for pattern in patterns:
                Pattern(pattern)
        except PatternError as error:
            raise GroupsError(f"{str(path)!r}: {name!r}: {error}") from error
    return {name: tuple(patterns) for name, patterns in groups.items()}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, which would keep the last of several entries of one name; TOML refuses them itself."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name!r} is there twice")
        made[name] = value
    return made


def _toml() -> Any:
    return import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
