"""Sharpness-Aware Minimization, related optimizers, and their schedules and tools."""

from fastsam.optim._engine.outer import OuterOptimizer
from fastsam.optim.batch_norm import frozen_batch_norm_statistics
from fastsam.optim.capture import capture_step
from fastsam.optim.local import local_sam_step
from fastsam.optim.passes import Need, passes_of
from fastsam.optim.rho import ConstantRho, CosineRho, LinearRho, RhoScheduler, StepRho
from fastsam.optim.sam import SAM
from fastsam.optim.skipped import kept_if_skipped
from fastsam.optim.variants import LPFSGD, PGD, EntropySGD, LookSAM

__all__ = [
    "LPFSGD",
    "PGD",
    "SAM",
    "ConstantRho",
    "CosineRho",
    "EntropySGD",
    "LinearRho",
    "LookSAM",
    "Need",
    "OuterOptimizer",
    "RhoScheduler",
    "StepRho",
    "capture_step",
    "frozen_batch_norm_statistics",
    "kept_if_skipped",
    "local_sam_step",
    "passes_of",
]
