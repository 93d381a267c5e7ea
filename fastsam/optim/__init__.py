"""Sharpness-Aware Minimization and what belongs to it."""

from fastsam.optim.batch_norm import frozen_batch_norm_statistics
from fastsam.optim.capture import capture_step
from fastsam.optim.local import local_sam_step
from fastsam.optim.rho import ConstantRho, CosineRho, LinearRho, RhoScheduler, StepRho
from fastsam.optim.sam import SAM

__all__ = [
    "SAM",
    "ConstantRho",
    "CosineRho",
    "LinearRho",
    "RhoScheduler",
    "StepRho",
    "capture_step",
    "frozen_batch_norm_statistics",
    "local_sam_step",
]
