"""Learnable weight scaling (LWS)."""

from fastsam.longtail.data.shared_recipes import KANG
from fastsam.longtail.settings import layer
from fastsam.longtail.stages.base import register_stages
from fastsam.longtail.stages.decoupled import decoupled

register_stages(
    decoupled(
        "lws",
        "train one factor per class on class-balanced images (Kang et al. 2020)",
        layer(KANG, head="lws", lws_trains_vectors=False),
        imagenet_lt=5,
        inaturalist18=5,
        places_lt=5,
    )
)
