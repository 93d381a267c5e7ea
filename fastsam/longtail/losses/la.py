"""Logit-adjusted loss (Menon et al. 2021): the VS loss without its divisors."""

from fastsam.longtail.losses.base import Loss, register_loss
from fastsam.longtail.losses.vs import TauSettings, VSLoss, added_prior

register_loss(
    Loss(
        name="la",
        build=lambda settings, classes: VSLoss(
            classes.counts, 0.0, settings.tau, classes.weight, mean=classes.mean
        ),
        settings=TauSettings,
        summary="logit-adjusted loss (VS loss with gamma = 0)",
        adjusts_logits=added_prior,
    )
)
