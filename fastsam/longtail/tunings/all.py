"""All parameters are trained."""

from fastsam.longtail.tunings.base import NetworkTuning, register_tuning

register_tuning(NetworkTuning(name="all", summary="train all parameters"))
