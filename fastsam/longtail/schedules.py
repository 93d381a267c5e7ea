"""Learning rate and rho by epoch, as the settings of a run describe them."""

from __future__ import annotations

from fastsam.longtail.config import TrainConfig
from fastsam.optim import CosineAnnealing, LinearSchedule, Schedule, StepSchedule, WarmUp


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate in ``epoch``, counted from 1.

    After a linear warm-up it is either ``lr`` times the factor of the phase (factors are relative to ``lr``,
    not to one another) or cosine annealing, which starts in epoch 1 or, with
    ``cosine_start="after-warmup"``, in the last epoch of the warm-up.
    """
    return WarmUp(_after_warmup(config), config.lr, config.warmup_epochs)(epoch)


def ascent_radius(config: TrainConfig, epoch: int) -> float | None:
    """Return the radius rho in ``epoch``, counted from 1, or None where the optimizer has none.

    ``linear`` runs from the first value in epoch 1 to the second in the last epoch. ``deferred`` switches to
    the second value after ``defer_epoch`` (Algorithm 1 of Rangwani et al. 2022).
    """
    if config.rho is None:
        return None
    return _radius(config, config.rho)(epoch)


def _after_warmup(config: TrainConfig) -> Schedule:
    if config.lr_schedule == "cosine":
        warmup = config.warmup_epochs if config.cosine_start == "after-warmup" else None
        return CosineAnnealing(config.lr, config.epochs, warmup)
    factors = (1.0, *(config.lr_factors or ()))
    return StepSchedule(config.lr_milestones or (), [config.lr * factor for factor in factors])


def _radius(config: TrainConfig, rho: tuple[float, ...]) -> Schedule:
    if config.rho_schedule == "linear":
        return LinearSchedule(rho[0], rho[1], config.epochs)
    if config.rho_schedule == "deferred":
        return StepSchedule((config.defer_epoch or 0,), rho)
    return StepSchedule(config.rho_milestones or (), rho)
