"""CutMix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsam.longtail.data.batch import Batch
from fastsam.longtail.mixers.base import Mixer, MixerPart, register_mixer
from fastsam.longtail.mixers.box import random_box
from fastsam.longtail.mixers.pairs import Pairs
from fastsam.longtail.settings import Entry, Settings, setting


@dataclass(frozen=True)
class CutMix(Mixer):
    """CutMix: a box of each image is replaced by that of its partner.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV
    2019), section 3.1. All images of a batch have the same box. Its share of the pixels is sampled from
    Beta(alpha, alpha) before it is clipped at the border; the shares of the two classes in the loss are the
    exact areas. Partners are a permutation of the batch.

    Attributes:
        alpha: parameter of the Beta distribution; 1 in the authors' code.
        probability: probability of mixing a batch; 0.5 for CIFAR and 1 for ImageNet in the authors' code.
    """

    alpha: float
    probability: float

    def applies(self, epoch: int, random: np.random.Generator) -> bool:
        """See :meth:`Mixer.applies`."""
        return bool(random.random() < self.probability)

    def mix(self, pairs: Pairs, random: np.random.Generator) -> Batch:
        """See :meth:`Mixer.mix`."""
        return pairs.pasted(random_box(random.beta(self.alpha, self.alpha), pairs.size, random))


@dataclass(frozen=True, kw_only=True)
class CutMixSettings(Settings):
    """Settings of CutMix."""

    cutmix_alpha: float = setting(
        "parameter alpha of CutMix, whose share of an image outside the box is sampled from Beta(alpha, "
        "alpha)",
        default=Entry(1.0, "code of Yun et al. 2019"),
        above=0,
        high=1000,
    )
    cutmix_probability: float = setting(
        "probability with which CutMix mixes a batch",
        default=Entry(0.5, "code of Yun et al. 2019 (CIFAR)"),
        low=0,
        high=1,
    )


register_mixer(
    MixerPart(
        name="cutmix",
        build=lambda settings, counts, run: CutMix(
            settings.cutmix_alpha, settings.cutmix_probability
        ),
        settings=CutMixSettings,
        summary="a box of each image from another image of the batch",
    )
)
