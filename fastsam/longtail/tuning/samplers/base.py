"""Interface of the samplers of trials, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.registry import Registry, RunPart


@dataclass(frozen=True, kw_only=True)
class TrialSampler(RunPart):
    """A sampler of trials. Once registered, ``fastsam tune --sampler NAME`` uses it.

    Attributes:
        build: ``build(trials, dimensions, seed)`` returns one point per trial in the unit cube: float64
            ``[trials, dimensions]``, from 0 (included) to 1 (excluded). It should return the same first rows
            for more trials, so that trials can be added.
    """

    build: Callable[[int, int, int], NDArray[np.float64]]


TRIAL_SAMPLERS: Registry[TrialSampler] = Registry(
    "trial sampler", "fastsam.longtail.tuning.samplers"
)
register_trial_sampler = TRIAL_SAMPLERS.add
