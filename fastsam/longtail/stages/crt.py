"""Classifier re-training (cRT)."""

from fastsam.longtail.data.shared_recipes import KANG
from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import Stage, StageList, register_stages
from fastsam.longtail.stages.decoupled import (
    BAG_CIFAR,
    LIKE_IMAGENET,
    head_only,
    kang_first,
    kang_second,
)

register_stages(
    StageList(
        name="crt",
        summary="re-train a new head on class-balanced images (Kang et al. 2020)",
        stages=(
            Stage(name="representation", exact=kang_first()),
            Stage(
                name="classifier",
                settings={
                    **head_only(KANG),
                    **layer(
                        KANG,
                        method="ce-rs",
                        sampling="class-aware",
                        head="linear",
                        head_init="torch",
                        head_from="fresh",
                    ),
                    **layer(f"{LIKE_IMAGENET} {KANG}", known=False, epochs=10),
                },
                exact={
                    **kang_second(imagenet_lt=10, inaturalist18=30, places_lt=10),
                    **BAG_CIFAR,
                },
            ),
        ),
    )
)
