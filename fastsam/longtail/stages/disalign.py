"""DisAlign: adjust the logits of a trained network by class and by confidence."""

from typing import Any

from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages
from fastsam.longtail.stages.decoupled import head_only

_CODE = "code of Zhang et al. 2021 (Megvii-BaseDetection/DisAlign)"
_LARGE: dict[str, Any] = {
    "batch_size": 256,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "warmup_epochs": 0,
    "lr_schedule": "cosine",
}

register_stages(
    StageList(
        name="disalign",
        module=__name__,
        summary="train an adjustment of the logits with weighted classes (Zhang et al. 2021)",
        stages=(
            Stage(
                name="representation",
                exact={("imagenet-lt", "*"): layer(_CODE, **_LARGE, epochs=90)},
            ),
            Stage(
                name="classifier",
                settings={
                    **head_only(_CODE),
                    **layer(_CODE, method="ce-rw", weighting="power", head="disalign"),
                    **layer(
                        f"the ImageNet-LT configuration of the {_CODE}",
                        known=False,
                        epochs=10,
                        weight_power=1.2,
                    ),
                },
                exact={("imagenet-lt", "*"): layer(_CODE, **_LARGE, epochs=10, weight_power=1.2)},
            ),
        ),
    )
)
