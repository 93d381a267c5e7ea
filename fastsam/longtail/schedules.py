"""Learning rate and rho of an epoch, in closed form, so that a resumed run needs no state."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from fastsam.longtail.config import TrainConfig


def piecewise(epoch: int, milestones: Sequence[int], values: Sequence[float]) -> float:
    """The value of the phase that holds ``epoch``.

    Args:
        epoch: counted from 1.
        milestones: last epoch of each phase but the final one, rising.
        values: one per phase, one more than there are milestones.

    Example:
        >>> [piecewise(e, (160, 180), (0.1, 0.001, 0.00001)) for e in (160, 161, 181)]
        [0.1, 0.001, 1e-05]
    """
    return values[bisect_left(milestones, epoch)]


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of ``epoch`` (counted from 1).

    Linear warm-up ``lr * epoch / warmup_epochs``, then either ``lr`` times the factor of the phase
    (the factors are relative to ``lr``, not to one another) or, without restarts,
    ``lr * (1 + cos(pi * (epoch - 1) / epochs)) / 2``. With ``cosine_start="after-warmup"`` it is
    ``lr * (1 + cos(pi * (epoch - W) / (epochs - W + 1))) / 2`` after W epochs of warm-up, as in the
    code of Cui et al. 2021 (``paco_lt.py``).
    """
    if epoch <= config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.lr_schedule == "cosine" and config.cosine_start == "after-warmup":
        warmup = config.warmup_epochs
        share = (epoch - warmup) / (config.epochs - warmup + 1)
        return config.lr * (1 + math.cos(math.pi * share)) / 2
    if config.lr_schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2
    factors = (1.0, *(config.lr_factors or ()))
    return config.lr * piecewise(epoch, config.lr_milestones or (), factors)


def ascent_radius(config: TrainConfig, epoch: int) -> float | None:
    """Radius rho of ``epoch`` (counted from 1), or None where the optimizer has none.

    ``linear`` runs from the first value at epoch 1 to the second at the last epoch; ``deferred``
    switches to the second value after ``defer_epoch`` (Algorithm 1 of Rangwani et al. 2022).
    """
    if config.rho is None:
        return None
    if config.rho_schedule == "linear":
        share = (epoch - 1) / max(config.epochs - 1, 1)
        return config.rho[0] + share * (config.rho[1] - config.rho[0])
    if config.rho_schedule == "deferred":
        return piecewise(epoch, (config.defer_epoch or 0,), config.rho)
    return piecewise(epoch, config.rho_milestones or (), config.rho)
