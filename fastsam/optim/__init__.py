"""Sharpness-Aware Minimization, related optimizers, and their schedules and tools."""

from typing import NoReturn

from fastsam.optim.batch_norm import frozen_batch_norm_statistics
from fastsam.optim.capture import capture_step
from fastsam.optim.late_phase import late_start
from fastsam.optim.layers import perturb_only
from fastsam.optim.local import local_sam_step
from fastsam.optim.m_sharpness import m_sam_step
from fastsam.optim.passes import Need, passes_of
from fastsam.optim.sam import SAM
from fastsam.optim.schedules import (
    CosineAnnealing,
    CosineSchedule,
    FunctionSchedule,
    LinearSchedule,
    RhoScheduler,
    Schedule,
    StepSchedule,
    WarmUp,
)
from fastsam.optim.skipped import kept_if_skipped
from fastsam.optim.variants import LPFSGD, PGD, EntropySGD, LookSAM

__all__ = [
    "LPFSGD",
    "PGD",
    "SAM",
    "CosineAnnealing",
    "CosineSchedule",
    "EntropySGD",
    "FunctionSchedule",
    "LinearSchedule",
    "LookSAM",
    "Need",
    "RhoScheduler",
    "Schedule",
    "StepSchedule",
    "WarmUp",
    "capture_step",
    "frozen_batch_norm_statistics",
    "kept_if_skipped",
    "late_start",
    "local_sam_step",
    "m_sam_step",
    "passes_of",
    "perturb_only",
]

_REPLACED = {
    "StepRho": "use StepSchedule with the same numbers, which are the last epochs of the phases",
    "LinearRho": "use LinearSchedule",
    "CosineRho": "use CosineSchedule",
    "ConstantRho": "a constant rho needs no schedule, set it in the optimizer or its param_groups",
}


def __getattr__(name: str) -> NoReturn:
    """Raise ImportError for names of earlier versions, with their replacement in the message."""
    if name in _REPLACED:
        # ImportError, because `from fastsam.optim import ...` hides the message of an AttributeError.
        raise ImportError(
            f"fastsam.optim.{name} was removed: {_REPLACED[name]}. Schedules now count epochs from 1, not "
            "from 0"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
