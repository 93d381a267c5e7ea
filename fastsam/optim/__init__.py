"""Sharpness-Aware Minimization and what belongs to it."""

from fastsam.optim.batch_norm import frozen_batch_norm_statistics
from fastsam.optim.capture import capture_step
from fastsam.optim.entropy import EntropySGD
from fastsam.optim.local import local_sam_step
from fastsam.optim.looksam import LookSAM
from fastsam.optim.lpf import LPFSGD
from fastsam.optim.passes import Need, passes_of
from fastsam.optim.pgd import PGD
from fastsam.optim.rho import ConstantRho, CosineRho, LinearRho, RhoScheduler, StepRho
from fastsam.optim.sam import SAM
from fastsam.optim.skipped import kept_if_skipped

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
    "RhoScheduler",
    "StepRho",
    "capture_step",
    "frozen_batch_norm_statistics",
    "kept_if_skipped",
    "local_sam_step",
    "passes_of",
]
