"""Which layers to keep in BF16, by model family: one file per family.

What others recommend for more families, and what was measured, is in ``docs/models.md``.
"""

from __future__ import annotations

from . import qwen_image, z_image
from .recipe import Groups, Recipe

RECIPES: dict[str, Recipe] = {recipe.transformer: recipe for recipe in (qwen_image.RECIPE, z_image.RECIPE)}
"""By the class of the transformer."""

RECOMMENDED: Groups = {transformer: recipe.keep for transformer, recipe in RECIPES.items()}
"""The ``ignored_layers`` that others recommend, by the class of the transformer."""

__all__ = ["RECIPES", "RECOMMENDED", "Groups", "Recipe"]
