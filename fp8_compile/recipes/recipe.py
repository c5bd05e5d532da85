"""What a recipe says of a model family."""

from __future__ import annotations

from dataclasses import dataclass, field

Groups = dict[str, tuple[str, ...]]
"""``ignored_layers`` by the name of the choice. Patterns are those of `fp8_compile.patterns`."""


@dataclass(frozen=True)
class Recipe:
    """What to keep in BF16 in one class of transformers.

    Attributes:
        transformer: the class, in diffusers.
        keep: the ``ignored_layers`` that others recommend to start with.
        sources: who recommends that, and where.
        groups: what an ablation compares; empty: one choice per part of the blocks.
    """

    transformer: str
    keep: tuple[str, ...]
    sources: tuple[str, ...]
    groups: Groups = field(default_factory=dict)
