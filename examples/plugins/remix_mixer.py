"""A mixer as a plug-in: Remix, a mixup whose classes may have other shares than the images.

Chou et al., "Remix: Rebalanced Mixup" (ECCV 2020 workshops). With the weight ``l`` of an
image of class i and a partner of class j, the share of i in the loss is 0 if ``n_i / n_j >= kappa`` and
``l < tau``, 1 if ``n_i / n_j <= 1 / kappa`` and ``1 - l < tau``, and ``l`` otherwise.

Each loss is multiplied by its own share. With its default loss, the code of Zhang et al. 2021
(BagofTricks-LT) multiplies the mean loss of the batch by the mean share.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data import Batch
from fastsam.longtail.mixers import Mixer, MixerPart, Pairs, register_mixer
from fastsam.longtail.settings import Entry, Settings, setting

_SOURCE = "Chou et al. 2020"


@dataclass(frozen=True, kw_only=True)
class RemixSettings(Settings):
    """Settings of Remix."""

    remix_alpha: float = setting(
        "parameter of the Beta distribution", default=Entry(1.0, _SOURCE), above=0
    )
    remix_kappa: float = setting("ratio of class sizes", default=Entry(3.0, _SOURCE), low=1)
    remix_tau: float = setting("threshold of shares", default=Entry(0.5, _SOURCE), low=0, high=1)


@dataclass(frozen=True)
class Remix(Mixer):
    """Mixes images like mixup, and labels in favor of the rarer class."""

    settings: RemixSettings
    counts: NDArray[np.int64]

    def mix(self, pairs: Pairs, random: np.random.Generator) -> Batch:
        """See :meth:`Mixer.mix`."""
        kappa, tau = self.settings.remix_kappa, self.settings.remix_tau
        weight = random.beta(self.settings.remix_alpha, self.settings.remix_alpha)
        ratio = self.counts[pairs.targets] / self.counts[pairs.second]
        share = np.full(len(ratio), weight)
        share[(ratio >= kappa) & (weight < tau)] = 0.0
        share[(ratio <= 1 / kappa) & (1 - weight < tau)] = 1.0
        return pairs.blended(weight, share)


register_mixer(
    MixerPart(
        name="remix",
        build=lambda settings, counts, run: Remix(settings, counts),
        settings=RemixSettings,
        summary="mixup whose labels favor the rarer class",
    )
)
