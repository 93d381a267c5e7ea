"""Tuning of settings: trials are drawn first, trained as a sweep, and compared on validation images."""

from fastsam.longtail.training.run_folder import TUNING_FILE
from fastsam.longtail.tuning.samplers import TRIAL_SAMPLERS, TrialSampler, register_trial_sampler
from fastsam.longtail.tuning.space import Choices, Dimension, Interval
from fastsam.longtail.tuning.tune import (
    Trial,
    Tuning,
    TuningPlan,
    check_trials,
    plan_trials,
    tune,
)

__all__ = [
    "TRIAL_SAMPLERS",
    "TUNING_FILE",
    "Choices",
    "Dimension",
    "Interval",
    "Trial",
    "TrialSampler",
    "Tuning",
    "TuningPlan",
    "check_trials",
    "plan_trials",
    "register_trial_sampler",
    "tune",
]
