"""Samplers of trials, one file each: they choose points of the search space before any trial starts."""

from fastsam.longtail.tuning.samplers.base import (
    TRIAL_SAMPLERS,
    TrialSampler,
    register_trial_sampler,
)

__all__ = ["TRIAL_SAMPLERS", "TrialSampler", "register_trial_sampler"]
