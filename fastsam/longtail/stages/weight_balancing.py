"""Weight balancing: strong weight decay, then a head with limited and decayed class vectors."""

from typing import Any

from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages
from fastsam.longtail.stages.decoupled import head_only

_CODE = "code of Alshammari et al. 2022 (ShadeAlsha/LTR-weight-balancing)"
_LIKE = f"the CIFAR-100-LT script of the {_CODE}"
_CIFAR: dict[str, Any] = {"batch_size": 64, "lr": 0.01}

register_stages(
    StageList(
        name="weight-balancing",
        module=__name__,
        summary="strong weight decay, then MaxNorm and decay of the head (Alshammari et al. 2022)",
        stages=(
            Stage(
                name="representation",
                settings=layer(_LIKE, known=False, weight_decay=5e-3),
                exact={
                    ("cifar100-lt", "100"): layer(
                        f"{_CODE}, with a ResNet-34",
                        **_CIFAR,
                        epochs=320,
                        weight_decay=5e-3,
                        warmup_epochs=0,
                        lr_schedule="cosine",
                    )
                },
            ),
            Stage(
                name="classifier",
                settings={
                    **head_only(_CODE),
                    **layer(
                        _CODE,
                        method="softmax-bce-rw",
                        weighting="effective",
                        beta=0.9999,
                        max_norm=("head.weight=range:0.1",),
                    ),
                    **layer(_LIKE, known=False, epochs=10, weight_decay=0.1),
                },
                exact={
                    ("cifar100-lt", "100"): layer(
                        f"{_CODE}, with a ResNet-34", **_CIFAR, epochs=10, weight_decay=0.1
                    )
                },
            ),
        ),
    )
)
