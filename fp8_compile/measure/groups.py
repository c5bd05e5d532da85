"""The choices of layers to keep in BF16 that an ablation compares: for a model, or read from a file."""

from __future__ import annotations

import functools
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import Fp8Error, PatternError
from ..patterns import Pattern
from ..pipelines.denoisers import repeated_blocks
from ..recipes import RECIPES, Groups
from ..weights.layers import SDPA


class GroupsError(Fp8Error, ValueError):
    """A file of groups that cannot be read, or does not map names to lists of patterns."""


def groups_for(denoiser: nn.Module, attention: bool = False) -> Groups:
    """The choices to compare for a model: those of its recipe, or where it has none, one per part of its blocks.

    Args:
        denoiser: a diffusers transformer or UNet. Parts are the children of its repeated blocks (of the model itself,
            if it names none) that hold linears.
        attention: compare the attention as it is written, too: the option ``attention`` asks for FP8.
    """
    as_written: Groups = {"skip attention itself": (SDPA,)} if attention else {}
    recipe = RECIPES.get(type(denoiser).__name__)
    if recipe is not None and recipe.groups:
        return {**recipe.groups, **as_written}
    blocks = [block for _, block in repeated_blocks(denoiser)] or [denoiser]
    parts = {
        name: None
        for block in blocks
        for name, child in block.named_children()
        if any(isinstance(module, nn.Linear) for module in child.modules())
    }
    return {"all FP8": (), **{f"skip {name}": (name,) for name in parts}, **as_written}


def read_groups(path: str | os.PathLike[str]) -> Groups:
    """Read groups from a ``.json`` or ``.toml`` file that maps each name to a list of patterns.

    Raises:
        GroupsError: the file cannot be read, or holds something else; the message names the entry.
    """
    path = Path(path)
    parsers: Mapping[str, Callable[[str], Any]] = {
        ".json": functools.partial(json.loads, object_pairs_hook=_without_repetition),
        ".toml": tomllib.loads,
    }
    if path.suffix not in parsers:
        raise GroupsError(f"{str(path)!r}: groups are read from {' and '.join(parsers)} files")
    try:
        groups = parsers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # both parsers raise kinds of ValueError
        raise GroupsError(f"{str(path)!r}: {error}") from error
    if not isinstance(groups, dict) or not groups:
        raise GroupsError(f"{str(path)!r}: expected a table of at least one name and its patterns, got {groups!r}")
    for name, patterns in groups.items():
        if not isinstance(patterns, list):
            raise GroupsError(f"{str(path)!r}: {name!r}: expected a list of patterns, got {patterns!r}")
        try:
            for pattern in patterns:
                Pattern(pattern)
        except PatternError as error:
            raise GroupsError(f"{str(path)!r}: {name!r}: {error}") from error
    return {name: tuple(patterns) for name, patterns in groups.items()}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. `json` would keep the last of two entries with one name; TOML refuses them itself."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name!r} is given twice")
        made[name] = value
    return made
