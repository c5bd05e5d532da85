"""Which layers to keep in BF16, by model family: one file per family.

``python -m fp8_compile.recipes`` prints the table of ``docs/models.md``, which is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..patterns import join
from . import (
    flux,
    flux2,
    hunyuan_video,
    hunyuan_video_15,
    ltx,
    ltx2,
    qwen_image,
    qwen_image_21,
    sd3,
    text_encoders,
    wan,
    z_image,
)
from .recipe import SOURCES, EncoderRecipe, Groups, Recipe

_FAMILIES = (
    z_image,
    qwen_image,
    qwen_image_21,
    flux,
    flux2,
    wan,
    hunyuan_video,
    hunyuan_video_15,
    ltx,
    ltx2,
    sd3,
)

RECIPES: dict[str, Recipe] = {family.RECIPE.transformer: family.RECIPE for family in _FAMILIES}
"""By the class of the transformer."""

ENCODERS: dict[str, EncoderRecipe] = {recipe.encoder: recipe for recipe in text_encoders.RECIPES}
"""By the class of the text encoder."""

__all__ = [
    "ENCODERS",
    "RECIPES",
    "EncoderRecipe",
    "Groups",
    "Recipe",
    "block_classes",
    "recipe_of",
    "recipes_in",
    "recommended",
    "table",
]


def recipe_of(module: nn.Module) -> Recipe | EncoderRecipe | None:
    """The recipe for the class of ``module`` itself, or for one that it inherits from."""
    every: dict[str, Recipe | EncoderRecipe] = {**ENCODERS, **RECIPES}
    return next((every[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in every), None)


def recipes_in(model: nn.Module) -> list[Recipe | EncoderRecipe]:
    """The recipes for the modules in ``model``, itself included."""
    return list({id(recipe): recipe for recipe in map(recipe_of, model.modules()) if recipe is not None}.values())


def block_classes(module: nn.Module) -> tuple[str, ...]:
    """The classes of the repeated blocks of ``module``, if diffusers names some and no recipe speaks of it.

    What is outside of them, embedders and the final projection, is kept where "recommended" asks for a recipe.
    """
    return () if recipe_of(module) is not None else tuple(getattr(type(module), "_repeated_blocks", None) or ())


def _outside_of_blocks(model: nn.Module) -> list[str]:
    """The paths of linears in models without a recipe that are in none of their blocks."""

    def below(module: nn.Module, path: str, blocks: tuple[str, ...]) -> Iterator[str]:
        blocks = block_classes(module) or blocks
        if recipe_of(module) is not None or type(module).__name__ in blocks:
            return
        if blocks and isinstance(module, nn.Linear):
            yield path
        for name, part in module.named_children():
            yield from below(part, join(path, name), blocks)

    return list(below(model, "", ()))


def recommended(model: nn.Module) -> tuple[str, ...]:
    """The ``ignored_layers`` that others recommend to start with; without a recipe, all outside of the repeated blocks.

    ``ignored_layers="recommended"`` stands for them.

    Args:
        model: a transformer, such as ``pipeline.transformer``, or what wraps one.

    Returns:
        Patterns; none where the recipe for the class of ``model`` keeps nothing, or there is none, and diffusers names
        no repeated blocks of it.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, for example pipeline.transformer, got {type(model).__name__}")
    of_recipes = [pattern for recipe in recipes_in(model) for pattern in recipe.keep]
    return tuple(dict.fromkeys([*of_recipes, *(f"re:^{re.escape(path)}$" for path in _outside_of_blocks(model))]))


def table() -> str:
    """All recipes and their sources, as Markdown."""
    numbers = {name: f"[{i}]" for i, name in enumerate(SOURCES, 1)}
    rows = [
        "| model | class of the transformer | steps | `ignored_layers` | others say | looked up |",
        "|---|---|---|---|---|---|",
    ]

    def cells(recipe: Recipe | EncoderRecipe) -> str:
        keep = ", ".join(f'"{pattern}"' for pattern in recipe.keep)
        says = re.sub(r"\[([\w-]+)\]", lambda found: numbers[found[1]], recipe.says)
        return f"`[{keep}]` | {says} | {recipe.date} |"

    rows += [f"| {recipe.models} | `{name}` | {recipe.steps} | {cells(recipe)}" for name, recipe in RECIPES.items()]
    rows += ["", "| text encoder | class | `ignored_layers` | others say | looked up |", "|---|---|---|---|---|"]
    rows += [f"| {recipe.models} | `{name}` | {cells(recipe)}" for name, recipe in ENCODERS.items()]
    return "\n".join([*rows, "", "Sources:", "", *(f"{i}. {text}" for i, text in enumerate(SOURCES.values(), 1))])
