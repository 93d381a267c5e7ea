"""Named recipes: published settings besides the standard recipe. Each file defines one, with its sources."""

from fastsam.longtail.named_recipes.base import (
    NAMED_RECIPES,
    STANDARD,
    NamedRecipe,
    register_recipe,
)

__all__ = ["NAMED_RECIPES", "STANDARD", "NamedRecipe", "register_recipe"]
