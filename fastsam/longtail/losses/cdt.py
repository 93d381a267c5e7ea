"""Class-dependent temperatures (Ye et al. 2020): the VS loss without its additive term."""

from fastsam.longtail.losses.base import Loss, register_loss
from fastsam.longtail.losses.vs import GammaSettings, VSLoss
from fastsam.longtail.settings import layer

register_loss(
    Loss(
        name="cdt",
        build=lambda settings, classes: VSLoss(
            classes.counts, settings.gamma, 0.0, classes.weight, mean=classes.mean
        ),
        settings=GammaSettings,
        summary="class-dependent temperatures (VS loss with tau = 0)",
        recipe=layer("the gamma of the VS loss", known=False, gamma=0.3),
    )
)
