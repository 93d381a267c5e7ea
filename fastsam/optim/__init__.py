"""Sharpness-Aware Minimization and what belongs to it."""

from fastsam.optim.sam import SAM

__all__ = ["SAM"]
