"""Lists of training stages. Each file defines one list with its sources, and registers it."""

from fastsam.longtail.stages.base import (
    BASE,
    STAGES,
    Stage,
    StageList,
    StageSettings,
    register_stages,
)

__all__ = ["BASE", "STAGES", "Stage", "StageList", "StageSettings", "register_stages"]
