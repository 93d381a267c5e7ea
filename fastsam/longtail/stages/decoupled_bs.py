"""Decoupled balanced softmax: re-train a new head with balanced softmax."""

from typing import Any

from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages
from fastsam.longtail.stages.decoupled import head_only

_CODE = "code of Ren et al. 2020 (BalancedMetaSoftmax-Classification)"
_FIRST: dict[str, Any] = {"batch_size": 512, "weight_decay": 5e-4, "lr_schedule": "cosine"}
_SECOND: dict[str, Any] = {"weight_decay": 5e-4, "epochs": 10}

register_stages(
    StageList(
        name="decoupled-bs",
        module=__name__,
        summary="re-train a new head with balanced softmax (Ren et al. 2020)",
        stages=(
            Stage(
                name="representation",
                exact={
                    ("imagenet-lt", "*"): layer(_CODE, **_FIRST, epochs=90, lr=0.2, warmup_epochs=0)
                },
            ),
            Stage(
                name="classifier",
                settings={
                    **head_only(_CODE),
                    **layer(
                        _CODE, method="bs", head="linear", head_init="torch", head_from="fresh"
                    ),
                    **layer(
                        f"the ImageNet-LT configuration of the {_CODE}", known=False, epochs=10
                    ),
                },
                exact={
                    # 2000 iterations of 512 images.
                    **{
                        (data, "200"): layer(
                            _CODE, epochs=epochs, batch_size=512, lr=0.1, weight_decay=5e-4
                        )
                        for data, epochs in (("cifar10-lt", 91), ("cifar100-lt", 106))
                    },
                    ("imagenet-lt", "*"): layer(_CODE, **_SECOND, batch_size=512, lr=0.4),
                    ("places-lt", "*"): layer(_CODE, **_SECOND, batch_size=256, lr=0.02),
                },
            ),
        ),
    )
)
