"""Balanced softmax (Ren et al. 2020): logit adjustment with tau = 1."""

from fastsam.longtail.losses.base import Loss, register_loss
from fastsam.longtail.losses.vs import VSLoss

register_loss(
    Loss(
        name="bs",
        build=lambda settings, classes: VSLoss(
            classes.counts, 0.0, 1.0, classes.weight, mean=classes.mean
        ),
        summary="balanced softmax (logit-adjusted loss with tau = 1)",
        adjusts_logits=lambda settings: "log prior (balanced softmax)",
    )
)
