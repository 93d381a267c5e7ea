"""MiSLAS: mixup, then label-aware smoothing of a head with a factor per class."""

from __future__ import annotations

from typing import Any

from fastsam.longtail.data.shared_recipes import MISLAS as _CODE
from fastsam.longtail.data.shared_recipes import MIXUP_LARGE, SMOOTHING
from fastsam.longtail.settings import Layer, borrowed, layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages
from fastsam.longtail.stages.decoupled import head_only

_PLACES = f"{_CODE}, which trains another network and fixes only a part of the statistics"
_LIKE = f"the ImageNet-LT configuration of the {_CODE}"
_PUBLISHED = ("100", "50", "10")
"""Imbalance factors of CIFAR-LT in the code."""
_CIFAR_FIRST = layer(_CODE, mixup_alpha=1.0, lr_milestones=(160, 180), lr_factors=(0.1, 0.01))
_CIFAR_SECOND = layer(_CODE, epochs=10, lr=0.1, weight_decay=2e-4)
_OTHER_FACTORS = "the recipe of imbalance 100"


def _second(data: str, imbalance: str, rate: float, **more: Any) -> Layer:
    """Return the settings of stage two: smoothing, and factor on the learning rate of the class vectors."""
    scale = (f"head.linear.*={rate:g}",)
    return {**SMOOTHING[data, imbalance], **layer(_CODE, lr_scale=scale, **more)}


_LARGE: dict[str, Any] = {"epochs": 10, "batch_size": 256, "lr": 0.1}
_LARGE_DECAYS = (("imagenet-lt", 5e-4), ("inaturalist18", 1e-4))
_CIFAR_RATES = (
    ("cifar10-lt", "100", 0.5),
    ("cifar10-lt", "50", 0.2),
    ("cifar10-lt", "10", 0.2),
    ("cifar100-lt", "100", 0.2),
    ("cifar100-lt", "50", 0.1),
    ("cifar100-lt", "10", 0.1),
)
"""Factors on the learning rate of the class vectors."""

register_stages(
    StageList(
        name="mislas",
        module=__name__,
        summary="mixup, then a scaled head with label-aware smoothing (Zhong et al. 2021)",
        stages=(
            Stage(
                name="representation",
                settings=layer(_CODE, mixer="mixup"),
                exact={
                    ("cifar*-lt", "*"): borrowed(_CIFAR_FIRST, _OTHER_FACTORS),
                    **{("cifar*-lt", factor): _CIFAR_FIRST for factor in _PUBLISHED},
                    **{(data, "*"): values for data, values in MIXUP_LARGE.items()},
                    ("places-lt", "*"): borrowed(MIXUP_LARGE["places-lt"], _PLACES),
                },
            ),
            Stage(
                name="classifier",
                settings={
                    **head_only(_CODE),
                    **layer(
                        _CODE,
                        method="las-rs",
                        sampling="class-aware",
                        head="lws",
                        lws_trains_vectors=True,
                    ),
                    **layer(
                        _LIKE,
                        known=False,
                        epochs=10,
                        las_head=0.3,
                        las_tail=0.0,
                        lr_scale=("head.linear.*=0.05",),
                    ),
                },
                exact={
                    ("cifar*-lt", "*"): borrowed(_CIFAR_SECOND, _OTHER_FACTORS),
                    **{("cifar*-lt", factor): _CIFAR_SECOND for factor in _PUBLISHED},
                    # The shifted batch normalization is off on CIFAR-10-LT.
                    ("cifar10-lt", "*"): layer(_CODE, batch_norm="frozen"),
                    **{
                        (data, imbalance): _second(data, imbalance, rate)
                        for data, imbalance, rate in _CIFAR_RATES
                    },
                    **{
                        (data, "*"): _second(data, "*", 0.05, weight_decay=decay, **_LARGE)
                        for data, decay in _LARGE_DECAYS
                    },
                    ("places-lt", "*"): borrowed(
                        _second(
                            "places-lt", "*", 0.05, weight_decay=5e-4, **_LARGE, batch_norm="frozen"
                        ),
                        _PLACES,
                    ),
                },
            ),
        ),
    )
)
