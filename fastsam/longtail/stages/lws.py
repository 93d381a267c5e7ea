"""Learnable weight scaling (LWS)."""

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
        name="lws",
        summary="train one factor per class on class-balanced images (Kang et al. 2020)",
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
                        head="lws",
                        lws_trains_vectors=False,
                    ),
                    **layer(f"{LIKE_IMAGENET} {KANG}", known=False, epochs=5),
                },
                exact={
                    **kang_second(imagenet_lt=5, inaturalist18=5, places_lt=5),
                    **BAG_CIFAR,
                },
            ),
        ),
    )
)
