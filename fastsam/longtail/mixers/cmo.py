"""Context-rich minority oversampling (CMO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.errors import UsageError
from fastsam.longtail.mixers.base import MixerPart, register_mixer
from fastsam.longtail.mixers.cutmix import CutMix
from fastsam.longtail.settings import Entry, Settings, setting


@dataclass(frozen=True)
class CMO(CutMix):
    """CMO: a box from an image of a re-sampled stream is pasted onto each image of the batch.

    Park et al., "The Majority Can Help the Minority: Context-rich Minority Oversampling for Long-tailed
    Classification" (CVPR 2022), algorithm 1. The images of the batch are the backgrounds. The partners, the
    foregrounds, are sampled from all training images in proportion to ``n^-power`` of their class. As in the
    authors' code, the first and the last epochs are not mixed.

    Attributes:
        first: first epoch with mixing, counted from 1.
        last: last epoch with mixing.
        class_shares: see :class:`Mixer`.
    """

    first: int
    last: int
    class_shares: NDArray[np.float64]

    def applies(self, epoch: int, random: np.random.Generator) -> bool:
        """See :meth:`Mixer.applies`."""
        return self.first <= epoch <= self.last and super().applies(epoch, random)


_CODE = "code of Park et al. 2022"


@dataclass(frozen=True, kw_only=True)
class CMOSettings(Settings):
    """Settings of CMO."""

    cmo_alpha: float = setting(
        "parameter alpha of CMO, whose share of an image outside the box is sampled from Beta(alpha, alpha)",
        default=Entry(1.0, _CODE),
        above=0,
        high=1000,
    )
    cmo_probability: float = setting(
        "probability with which CMO mixes a batch", default=Entry(0.5, _CODE), low=0, high=1
    )
    cmo_power: float = setting(
        "exponent p of the sampling of CMO's foregrounds: an image is sampled in proportion to 1/n^p of its "
        "class. With 1, all classes are equally frequent",
        default=Entry(1.0, _CODE),
        low=0,
        high=100,
    )
    cmo_skip_first: int = setting(
        "number of epochs at the beginning of the run that CMO does not mix",
        default=Entry(4, f"{_CODE}: it mixes in epochs above 3, counted from 0"),
        low=0,
    )
    cmo_skip_last: int = setting(
        "number of epochs at the end of the run that CMO does not mix",
        default=Entry(3, _CODE),
        low=0,
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that some epoch is mixed."""
        super().check(run)
        if self.cmo_skip_first + self.cmo_skip_last >= run["epochs"]:
            raise UsageError(
                f"cmo_skip_first and cmo_skip_last must add up to less than epochs ({run['epochs']}), got "
                f"{self.cmo_skip_first} and {self.cmo_skip_last}; CMO would mix no epoch, lower them"
            )


def _build(settings: CMOSettings, counts: NDArray[np.int64], run: Mapping[str, Any]) -> CMO:
    # The classes are sampled in proportion to n * n^-power; a class without images is never sampled.
    shares = np.where(counts > 0, np.maximum(counts, 1) ** (1.0 - settings.cmo_power), 0.0)
    return CMO(
        settings.cmo_alpha,
        settings.cmo_probability,
        first=settings.cmo_skip_first + 1,
        last=run["epochs"] - settings.cmo_skip_last,
        class_shares=shares / shares.sum(),
    )


register_mixer(
    MixerPart(
        name="cmo",
        build=_build,
        settings=CMOSettings,
        summary="a box of an image of a class-balanced stream on each image of the batch",
    )
)
