"""``long``: 400 epochs with RandAugment, as the baselines of PaCo are trained."""

from fastsam.longtail.data.shared_recipes import PACO_CIFAR100
from fastsam.longtail.named_recipes.base import NamedRecipe, register_recipe
from fastsam.longtail.settings import borrowed, layer

RANDAUGMENT = layer(
    "stands for AutoAugment and Cutout in the authors' codes", known=False, augment="randaugment"
)
"""Augmentation of the recipes of 400 epochs on CIFAR-LT."""
_CIFAR = {**borrowed(PACO_CIFAR100, "PaCo on cifar100-lt, code of Cui et al. 2021"), **RANDAUGMENT}

register_recipe(
    NamedRecipe(
        name="long",
        module=__name__,
        summary="400 epochs with RandAugment; published for paco (Cui et al. 2021)",
        exact={
            ("cifar10-lt", "*", "*"): _CIFAR,
            ("cifar100-lt", "*", "*"): _CIFAR,
            ("cifar100-lt", "*", "paco"): {**PACO_CIFAR100, **RANDAUGMENT},
        },
    )
)
