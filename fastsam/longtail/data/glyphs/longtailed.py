"""Glyphs as a long-tailed data set of CIFAR's size."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.longtail.data.catalog import DataSetPart, ImbalanceSettings, register_dataset
from fastsam.longtail.data.cifar_like import made_long_tailed
from fastsam.longtail.data.dataset import LongTailData, TensorImages
from fastsam.longtail.data.glyphs.alphabets import ALPHABETS
from fastsam.longtail.data.glyphs.cache import cached_images
from fastsam.longtail.data.glyphs.check import check_glyphs
from fastsam.longtail.data.glyphs.generate import SPECS, GlyphSpec, Part
from fastsam.longtail.data.shared_recipes import CIFAR
from fastsam.longtail.data.subset import ImbalanceKind
from fastsam.longtail.settings import borrowed, layer

# Those of the balanced training images, scaled to [0, 1], to within 0.004.
_MEAN, _STD = (0.4514, 0.4506, 0.4503), (0.2462, 0.2519, 0.2456)


def load_glyphs_lt(
    spec: GlyphSpec,
    *,
    imbalance: float = 100.0,
    kind: ImbalanceKind = "exp",
    subset_seed: int = 0,
    folder: Path | None = None,
    progress: bool = True,
) -> LongTailData:
    """Images of 10 or 100 characters with a long tail; all other sets are balanced.

    Training images are cut as those of CIFAR are. ``validation`` and ``test`` have the same faces
    and styles as ``train``, drawn anew; ``unseen`` has other faces.

    Args:
        spec: one of :data:`SPECS`, or a smaller or larger set of the same kind.
        imbalance: largest over smallest class count; 1 leaves the set balanced.
        kind: exponential or step profile.
        subset_seed: seed of the selection.
        folder: where the images are kept; None for the user's cache.
        progress: show a progress bar while they are drawn.

    Raises:
        DataError: if matplotlib's fonts are missing, or the cached file is damaged.
    """
    images = cached_images(spec, folder=folder, progress=progress)
    parts = split_parts(spec, images)
    return made_long_tailed(
        f"glyphs{spec.num_classes}-lt",
        tuple(ALPHABETS[spec.num_classes].characters),
        parts[Part.TRAIN],
        parts[Part.TEST],
        imbalance=imbalance,
        kind=kind,
        subset_seed=subset_seed,
        validation=parts[Part.VALIDATION] if spec.validation else None,
        unseen=parts[Part.UNSEEN],
    )


def split_parts(spec: GlyphSpec, images: NDArray[np.uint8]) -> dict[Part, TensorImages]:
    """The images of :func:`~.generate.generate` as one set for every part; nothing is copied."""
    sets, first = {}, 0
    for part, size in spec.sizes().items():
        pixels = torch.from_numpy(images[first : first + size])
        sets[part] = TensorImages(pixels, spec.targets(part), white=255.0, mean=_MEAN, std=_STD)
        first += size
    return sets


def _load(num_classes: int, settings: ImbalanceSettings, progress: bool) -> LongTailData:
    return load_glyphs_lt(
        SPECS[num_classes],
        imbalance=settings.imbalance,
        kind=settings.kind,
        subset_seed=settings.subset_seed,
        progress=progress,
    )


for _classes in (10, 100):
    register_dataset(
        DataSetPart(
            name=f"glyphs{_classes}-lt",
            build=partial(_load, _classes),
            summary=f"{_classes} drawn characters, long-tailed",
            settings=ImbalanceSettings,
            where="drawn here, once, with the fonts of matplotlib",
            recipe={
                **layer("definition of glyphs-lt", imbalance=100.0, kind="exp", subset_seed=0),
                **borrowed(CIFAR, "the recipe of CIFAR-LT"),
            },
            check=partial(lambda classes, settings: check_glyphs(SPECS[classes]), _classes),
        )
    )
