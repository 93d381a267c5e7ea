"""Base class and registry of mixers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.batch import Batch
from fastsam.longtail.errors import UsageError
from fastsam.longtail.mixers.pairs import Pairs
from fastsam.longtail.objective import Term
from fastsam.longtail.registry import Registry, RunPart


class Mixer(ABC):
    """Combines each image of a batch with a partner.

    A batch is mixed once; all passes of its step see the same images. The generator that a method receives
    is seeded by the seed of the run, the epoch and the number of the batch. The methods are called in the
    order below, each with the generator as the one before left it, so that they share its numbers. Draw
    numbers for the images of all ranks, never only for those of this rank.

    Attributes:
        class_shares: probability of each class in a second stream of images, float64 ``[C]``: the partners
            are sampled from all training images, with replacement. None to use images of the same batch.
    """

    class_shares: NDArray[np.float64] | None = None

    def applies(self, epoch: int, random: np.random.Generator) -> bool:
        """Return whether to mix a batch; by default always.

        Args:
            epoch: epoch, counted from 1.
            random: generator of the batch.
        """
        return True

    def partners(
        self, targets: NDArray[np.int64], random: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return the place of each image's partner in the batch, int64 ``[N]``; by default a permutation.

        It is not called if the partners are from a second stream.

        Args:
            targets: classes of the images of all ranks, int64 ``[N]``.
            random: generator of the batch.
        """
        return random.permutation(len(targets))

    @abstractmethod
    def mix(self, pairs: Pairs, random: np.random.Generator) -> Batch:
        """Mix the images of a batch.

        Args:
            pairs: the images and their partners. Return ``pairs.blended(...)`` or ``pairs.pasted(...)``.
            random: generator of the batch.
        """


@dataclass(frozen=True, kw_only=True)
class MixerPart(RunPart):
    """A registered mixer: ``--mixer NAME`` trains with it.

    Attributes:
        build: ``build(settings, counts, run)`` creates a :class:`Mixer` from the training images of each
            class, int64 ``[C]``, and all settings of the run by name. It returns None to leave batches as
            they are.
    """

    build: Callable[[Any, NDArray[np.int64], Mapping[str, Any]], Mixer | None]


MIXERS: Registry[MixerPart] = Registry("mixer", "fastsam.longtail.mixers")
register_mixer = MIXERS.add


def check_mixing(run: Mapping[str, Any], term: Term) -> None:
    """Check that the loss of a run and its ascents can use mixed images.

    Args:
        run: all settings of the run by name.
        term: the loss.

    Raises:
        UsageError: if they cannot.
    """
    reason = None
    if term.views > 1:
        reason = f"compares {term.views} views of each image"
    elif term.couples_batch:
        reason = "compares the images of a batch with each other"
    elif not term.mixes:
        reason = "does not multiply the loss of each image by Given.shares (see Term.mixes)"
    mixer = f"mixer {run['mixer']!r}"
    if reason is not None:
        raise UsageError(
            f"{mixer} gives each image two classes, but the loss of method {run['method']!r} {reason}; "
            "choose another method or mixer='none'"
        )
    if run.get("ascent_sample") == "weighted":
        raise UsageError(
            f"ascent_sample 'weighted' samples images by the weight of their class, but {mixer} gives each "
            "image two classes; choose ascent_sample='uniform' or mixer='none'"
        )
