"""A mixer as a plug-in: Balanced-MixUp, whose partners are a class-balanced second stream.

Galdran et al., "Balanced-MixUp for Highly Imbalanced Medical Image Classification" (MICCAI 2021):
``(1 - l) * image + l * partner`` with ``l ~ Beta(alpha, 1)``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data import Batch
from fastsam.longtail.mixers import Mixer, MixerPart, Pairs, register_mixer
from fastsam.longtail.settings import Entry, Settings, setting


@dataclass(frozen=True, kw_only=True)
class BalancedMixupSettings(Settings):
    """Settings of Balanced-MixUp."""

    balanced_mixup_alpha: float = setting(
        "parameter of the Beta distribution",
        default=Entry(0.2, "Galdran et al. 2021"),
        above=0,
    )


class BalancedMixup(Mixer):
    """Mixes each image with an image of the balanced stream."""

    def __init__(self, alpha: float, counts: NDArray[np.int64]) -> None:
        self.alpha = alpha
        self.class_shares = (counts > 0) / np.count_nonzero(counts)

    def mix(self, pairs: Pairs, random: np.random.Generator) -> Batch:
        """See :meth:`Mixer.mix`."""
        return pairs.blended(1 - random.beta(self.alpha, 1))


register_mixer(
    MixerPart(
        name="balanced-mixup",
        build=lambda settings, counts, run: BalancedMixup(settings.balanced_mixup_alpha, counts),
        settings=BalancedMixupSettings,
        summary="mixup with a class-balanced stream",
    )
)
