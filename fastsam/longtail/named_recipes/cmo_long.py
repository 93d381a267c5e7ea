"""``cmo-long``: 400 epochs of context-rich minority oversampling with strong augmentation."""

from typing import Any

from fastsam.longtail.named_recipes.base import NamedRecipe, register_recipe
from fastsam.longtail.named_recipes.cmo import CODE
from fastsam.longtail.named_recipes.long import RANDAUGMENT
from fastsam.longtail.settings import borrowed, layer

_SHARED: dict[str, Any] = {"mixer": "cmo", "epochs": 400, "batch_size": 128, "warmup_epochs": 10}
_LARGE = {
    **layer(CODE, **_SHARED, lr=0.02, lr_schedule="cosine", cosine_start="after-warmup"),
    **layer(
        "the magnitude in the code of Park et al. 2022, which also has a second pipeline",
        known=False,
        augment="randaugment",
        randaugment_operations=2,
        randaugment_magnitude=10,
    ),
}
_BS = {
    "cifar100-lt": {
        **layer(
            CODE,
            **_SHARED,
            lr=0.1,
            weight_decay=2e-4,
            lr_schedule="multistep",
            # The code lowers lr in epochs above 320 and 360, counted from 0.
            lr_milestones=(321, 361),
            lr_factors=(0.1, 0.01),
        ),
        **RANDAUGMENT,
    },
    "imagenet-lt": {**_LARGE, **layer(CODE, weight_decay=5e-4)},
    "inaturalist18": {**_LARGE, **layer(CODE, weight_decay=1e-4)},
}
_OTHERS = {data: borrowed(values, "the recipe of bs") for data, values in _BS.items()}

register_recipe(
    NamedRecipe(
        name="cmo-long",
        module=__name__,
        summary="CMO, 400 epochs with RandAugment; published for bs (Park et al. 2022)",
        exact={
            ("cifar10-lt", "*", "*"): borrowed(_BS["cifar100-lt"], "the recipe of cifar100-lt"),
            **{(data, "*", "*"): values for data, values in _OTHERS.items()},
            **{(data, "*", "bs"): values for data, values in _BS.items()},
        },
    )
)
