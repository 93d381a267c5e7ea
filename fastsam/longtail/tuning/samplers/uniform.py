"""Independent uniform points: random search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.tuning.samplers.base import TrialSampler, register_trial_sampler


def _points(trials: int, dimensions: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((trials, dimensions))


register_trial_sampler(
    TrialSampler(name="random", build=_points, summary="independent uniform points")
)
