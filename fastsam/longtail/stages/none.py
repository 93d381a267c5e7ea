"""A run without stages."""

from fastsam.longtail.settings import NoSettings
from fastsam.longtail.stages.base import StageList, register_stages

register_stages(StageList(name="none", module=__name__, summary="one stage", settings=NoSettings))
