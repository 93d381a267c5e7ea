"""``mixup``: cross-entropy with mixup in the settings of its long-tailed baselines."""

from fastsam.longtail.data.shared_recipes import BAG, MISLAS, MIXUP_LARGE
from fastsam.longtail.named_recipes.base import NamedRecipe, register_recipe
from fastsam.longtail.settings import borrowed, layer

_CIFAR = layer(
    BAG,
    mixer="mixup",
    mixup_alpha=1.0,
    epochs=400,
    batch_size=128,
    lr=0.1,
    weight_decay=2e-4,
    nesterov=True,
    warmup_epochs=5,
    lr_schedule="multistep",
    lr_milestones=(320, 360),
    lr_factors=(0.01, 0.0001),
)
_OTHERS = borrowed(_CIFAR, "the recipe of ce at imbalance 100 and 50")

register_recipe(
    NamedRecipe(
        name="mixup",
        module=__name__,
        summary="mixup, at least twice the epochs of standard (Zhang et al. 2021, Zhong et al. 2021)",
        exact={
            ("cifar10-lt", "*", "*"): _OTHERS,
            ("cifar100-lt", "*", "*"): _OTHERS,
            **{
                (data, factor, "ce"): _CIFAR
                for data in ("cifar10-lt", "cifar100-lt")
                for factor in ("100", "50")
            },
            **{
                (data, "*", "*"): borrowed(
                    {**layer(MISLAS, mixer="mixup"), **values}, "the recipe of ce"
                )
                for data, values in MIXUP_LARGE.items()
            },
            **{
                (data, "*", "ce"): {**layer(MISLAS, mixer="mixup"), **values}
                for data, values in MIXUP_LARGE.items()
            },
        },
    )
)
