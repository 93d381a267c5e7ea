"""All parameters are trained."""

from fastsam.longtail.tunings.base import Tuning, register_tuning

register_tuning(Tuning(name="all", summary="train all parameters"))
