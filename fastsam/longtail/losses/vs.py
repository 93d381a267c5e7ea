"""Vector-scaling loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastsam.longtail.classes import checked_counts, prior
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import LongTailLoss, Loss, Mean, register_loss
from fastsam.longtail.settings import Entry, Settings, layer, setting


class VSLoss(LongTailLoss):
    """Vector-scaling loss: cross-entropy of ``z / (n_max / n)^gamma + tau log(prior)``.

    Kini et al., "Label-Imbalanced and Group-Sensitive Classification under Overparameterization"
    (NeurIPS 2021), equation 2. With ``tau = 0`` it is CDT, with ``gamma = 0`` the logit-adjusted loss, and
    with ``gamma = 0, tau = 1`` balanced softmax.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        gamma: exponent of the divisors, at least 0; 0.3 in the authors' code.
        tau: factor on the log prior; 1 in the authors' code.
        weight: class weights ``[C]``.
        mean: see :class:`LongTailLoss`.
    """

    divisors: Tensor
    offsets: Tensor

    def __init__(
        self,
        counts: ArrayLike,
        gamma: float = 0.3,
        tau: float = 1.0,
        weight: Tensor | None = None,
        *,
        mean: Mean = "weights",
    ) -> None:
        super().__init__(weight=weight, mean=mean)
        values = checked_counts(counts)
        if not (math.isfinite(gamma) and gamma >= 0 and math.isfinite(tau)):
            raise UsageError(
                f"gamma and tau must be finite and gamma at least 0, got gamma={gamma}, tau={tau}"
            )
        self.register_buffer("divisors", torch.from_numpy((values.max() / values) ** gamma))
        self.register_buffer("offsets", tau * prior(counts).log())

    def per_sample(self, logits: Tensor, targets: Tensor, features: Tensor | None) -> Tensor:
        """Compute the VS loss of every sample, ``[B]``."""
        adjusted = logits / self.divisors.to(logits) + self.offsets.to(logits)
        return super().per_sample(adjusted, targets, features)


@dataclass(frozen=True, kw_only=True)
class GammaSettings(Settings):
    """Setting of losses that divide logits by a power of the class counts."""

    gamma: float = setting(
        "exponent gamma: logits are divided by (size of the largest class / size of the class)^gamma",
        default=Entry(
            0.3, "[code] defaults; the values behind Table 1 are not published", known=False
        ),
        low=0,
        high=1000,
    )


@dataclass(frozen=True, kw_only=True)
class TauSettings(Settings):
    """Setting of losses that add a multiple of the log prior to logits."""

    tau: float = setting(
        "strength tau of the logit adjustment: tau * log prior is added to the logits",
        default=Entry(1.0, "Menon et al. 2021: tau = 1 is the consistent choice"),
        low=0,
        high=1000,
    )


@dataclass(frozen=True, kw_only=True)
class VSSettings(TauSettings, GammaSettings):
    """Settings of the VS loss."""


def added_prior(settings: TauSettings) -> str | None:
    """Describe the log prior that a loss adds; return None for tau = 0."""
    return None if settings.tau == 0 else f"tau * log prior with tau {settings.tau}"


register_loss(
    Loss(
        name="vs",
        build=lambda settings, classes: VSLoss(
            classes.counts, settings.gamma, settings.tau, classes.weight, mean=classes.mean
        ),
        settings=VSSettings,
        summary="vector-scaling loss",
        adjusts_logits=added_prior,
        recipe=layer(
            "[code] defaults; the values behind Table 1 are not published", known=False, tau=1.0
        ),
    )
)
