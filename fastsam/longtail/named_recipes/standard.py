"""The standard recipe: that of the data set, the method and the optimizer."""

from fastsam.longtail.named_recipes.base import STANDARD, NamedRecipe, register_recipe

register_recipe(
    NamedRecipe(
        name=STANDARD,
        module=__name__,
        summary="the settings of the data set, the method and the optimizer",
    )
)
