"""``cmo``: context-rich minority oversampling in the settings of its authors."""

from typing import Any

from fastsam.longtail.named_recipes.base import NamedRecipe, register_recipe
from fastsam.longtail.settings import borrowed, layer

CODE = "code of Park et al. 2022 (naver-ai/cmo)"
_SHARED: dict[str, Any] = {
    "mixer": "cmo",
    "lr": 0.1,
    "weight_decay": 2e-4,
    "warmup_epochs": 5,
    "lr_schedule": "multistep",
}
_CIFAR100 = layer(
    CODE,
    **_SHARED,
    epochs=200,
    batch_size=128,
    lr_milestones=(160, 180),
    lr_factors=(0.01, 0.0001),
    defer_epoch=160,
)

register_recipe(
    NamedRecipe(
        name="cmo",
        module=__name__,
        summary="CMO, 200 epochs on CIFAR-LT, 100 on large sets (Park et al. 2022)",
        exact={
            ("cifar10-lt", "*", "*"): borrowed(_CIFAR100, "the recipe of cifar100-lt"),
            ("cifar100-lt", "*", "*"): _CIFAR100,
            ("imagenet-lt", "*", "*"): layer(
                CODE,
                **_SHARED,
                epochs=100,
                batch_size=128,
                lr_milestones=(60, 80),
                lr_factors=(0.1, 0.01),
                defer_epoch=80,
            ),
            ("inaturalist18", "*", "*"): {
                # The code has a second milestone and a deferral epoch of 160, which 100 epochs never reach.
                **layer(
                    CODE,
                    **_SHARED,
                    epochs=100,
                    batch_size=256,
                    lr_milestones=(75,),
                    lr_factors=(0.1,),
                ),
                **layer("the recipe of imagenet-lt", known=False, defer_epoch=80),
            },
        },
    )
)
