"""Mixup."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsam.longtail.data.batch import Batch
from fastsam.longtail.mixers.base import Mixer, MixerPart, register_mixer
from fastsam.longtail.mixers.pairs import Pairs
from fastsam.longtail.settings import Entry, Settings, setting


@dataclass(frozen=True)
class Mixup(Mixer):
    """Mixup: ``l * image + (1 - l) * partner``, and the same share ``l`` of their classes in the loss.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018), section 2. As in the authors' code,
    one ``l ~ Beta(alpha, alpha)`` is sampled for a batch, and partners are a permutation of the batch.

    Attributes:
        alpha: parameter of the Beta distribution; 1 for CIFAR, 0.1 to 0.4 for ImageNet.
    """

    alpha: float

    def mix(self, pairs: Pairs, random: np.random.Generator) -> Batch:
        """See :meth:`Mixer.mix`."""
        return pairs.blended(random.beta(self.alpha, self.alpha))


@dataclass(frozen=True, kw_only=True)
class MixupSettings(Settings):
    """Settings of mixup."""

    mixup_alpha: float = setting(
        "parameter alpha of mixup, whose weight of an image is sampled from Beta(alpha, alpha)",
        default=Entry(1.0, "Zhang et al. 2018 and code of Zhong et al. 2021 (CIFAR)"),
        above=0,
        high=1000,
    )


register_mixer(
    MixerPart(
        name="mixup",
        build=lambda settings, counts, run: Mixup(settings.mixup_alpha),
        settings=MixupSettings,
        summary="weighted means of two images of a batch",
    )
)
