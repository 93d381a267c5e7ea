"""A run without stages."""

from fastsam.longtail.settings import NoSettings
from fastsam.longtail.stages.base import StageList, register_stages

register_stages(StageList(name="none", summary="one stage", settings=NoSettings))
