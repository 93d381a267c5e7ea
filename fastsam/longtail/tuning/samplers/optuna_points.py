"""Points of a scrambled Sobol sequence, from Optuna: they cover the space more evenly than random ones."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from fastsam.extras import requires_extra
from fastsam.longtail.tuning.samplers.base import TrialSampler, register_trial_sampler


def _points(trials: int, dimensions: int, seed: int) -> NDArray[np.float64]:
    with requires_extra("optuna", "the trial sampler optuna"):
        import optuna
        from optuna.distributions import FloatDistribution
    space = {f"x{place}": FloatDistribution(0.0, 1.0) for place in range(dimensions)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(
            scramble=True, seed=seed, warn_independent_sampling=False
        )
    points = np.empty((trials, dimensions))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=sampler)
        for row in points:
            trial = study.ask(space)
            row[:] = [trial.params[name] for name in space]
            # The sequence begins after the first trial with a value; no point depends on the values.
            study.tell(trial, 0.0)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return np.minimum(points, np.nextafter(1.0, 0.0))


register_trial_sampler(
    TrialSampler(
        name="optuna", build=_points, summary="a scrambled Sobol sequence (QMCSampler of Optuna)"
    )
)
