"""A mixer as a plug-in: UniMix, whose weights and partners depend on the sizes of the two classes.

Xu et al., "Towards Calibrated Model for Long-Tailed Visual Recognition from Prior Perspective" (NeurIPS
2021), in the form of the authors' code (``core.py`` of XuZhengzhuo/Prior-LT). Their code does
not mix the last 100 of 300 epochs; this example mixes all.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data import Batch
from fastsam.longtail.mixers import Mixer, MixerPart, Pairs, register_mixer
from fastsam.longtail.settings import Entry, Settings, setting

_CODE = "code of Xu et al. 2021 (CIFAR-100-LT)"


@dataclass(frozen=True, kw_only=True)
class UniMixSettings(Settings):
    """Settings of UniMix."""

    unimix_alpha: float = setting(
        "parameter of the Beta distribution", default=Entry(0.8, _CODE), above=0
    )
    unimix_tau: float = setting(
        "partners are sampled from the batch in proportion to n^tau", default=Entry(-0.1, _CODE)
    )


@dataclass(frozen=True)
class UniMix(Mixer):
    """Samples the weight of each pair of images, and rare partners more often."""

    settings: UniMixSettings
    counts: NDArray[np.int64]

    def partners(
        self, targets: NDArray[np.int64], random: np.random.Generator
    ) -> NDArray[np.int64]:
        """See :meth:`Mixer.partners`."""
        chances = self.counts[targets] ** float(self.settings.unimix_tau)
        return random.choice(len(targets), len(targets), p=chances / chances.sum())

    def mix(self, pairs: Pairs, random: np.random.Generator) -> Batch:
        """See :meth:`Mixer.mix`."""
        own, other = self.counts[pairs.targets], self.counts[pairs.second]
        alpha = self.settings.unimix_alpha
        weights = random.beta(alpha, alpha, len(own)) + other / (own + other)
        return pairs.blended(np.where(weights > 1, weights - 1, weights))


register_mixer(
    MixerPart(
        name="unimix",
        build=lambda settings, counts, run: UniMix(settings, counts),
        settings=UniMixSettings,
        summary="mixup with a weight for each pair of classes",
    )
)
