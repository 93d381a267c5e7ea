"""Classifier re-training (cRT)."""

from fastsam.longtail.data.shared_recipes import KANG
from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import register_stages
from fastsam.longtail.stages.decoupled import decoupled

register_stages(
    decoupled(
        "crt",
        "re-train a new head on class-balanced images (Kang et al. 2020)",
        layer(KANG, head="linear", head_init="torch", head_from="fresh"),
        imagenet_lt=10,
        inaturalist18=30,
        places_lt=10,
    )
)
