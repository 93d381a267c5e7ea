"""``digits-lt``: scikit-learn's 1,797 handwritten digits, cut to a long tail. Needs no download."""

from __future__ import annotations

import numpy as np
import torch

from fastsam.extras import requires_extra
from fastsam.longtail.data.augment import RandomCrop
from fastsam.longtail.data.catalog import DataSetPart, ImbalanceSettings, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.groups import groups_by_rank
from fastsam.longtail.data.label_noise import with_label_noise
from fastsam.longtail.data.subset import (
    ImbalanceKind,
    longtail_counts,
    longtail_indices,
    shuffled_by_class,
    subset_hash,
)
from fastsam.longtail.data.tensor_images import TensorImages
from fastsam.longtail.settings import layer

POOL = 100
"""Number of images per class from which the training set is selected."""
VALIDATION = 24
"""Number of validation images per class, which follow the pool. The rest is the test set."""

# Mean and standard deviation of all 1,797 images scaled to [0, 1].
_MEAN, _STD = 0.3053, 0.3760


def load_digits_lt(
    *,
    imbalance: float = 50.0,
    kind: ImbalanceKind = "exp",
    subset_seed: int = 0,
    label_noise: float = 0.0,
) -> LongTailData:
    """Load long-tailed handwritten digits: 8x8 pixels, 10 classes.

    Every class is shuffled by ``subset_seed``. The training images are selected from its first 100 images,
    the next 24 are validation images, and the rest (50 to 59) are test images. Validation and test images
    do not depend on the imbalance.

    Args:
        imbalance: imbalance factor, 1 to 100: size of the largest class divided by the size of the smallest.
        kind: exponential or step profile.
        subset_seed: seed of the split and the selection, independent of the seed of the training.
        label_noise: fraction of the training labels that are replaced by another class.

    Example:
        >>> load_digits_lt(imbalance=50).counts.tolist()
        [100, 64, 41, 27, 17, 11, 7, 4, 3, 2]
    """
    with requires_extra("longtail", "digits-lt"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    targets = np.asarray(bunch.target, dtype=np.int64)
    pixels = torch.from_numpy(np.asarray(bunch.images, dtype=np.uint8))[:, None]
    digits = TensorImages(pixels, targets, white=16.0, mean=(_MEAN,), std=(_STD,))
    counts = longtail_counts(POOL, 10, imbalance, kind)
    order = shuffled_by_class(targets, 10, subset_seed)
    train = longtail_indices(targets, counts, subset_seed)
    validation = np.concatenate([indices[POOL : POOL + VALIDATION] for indices in order])
    test = np.concatenate([indices[POOL + VALIDATION :] for indices in order])
    data = LongTailData(
        name="digits-lt",
        train=digits.select(train, augmentation=RandomCrop(padding=1)),
        validation=digits.select(validation),
        test=digits.select(test),
        class_names=tuple(str(digit) for digit in range(10)),
        groups=groups_by_rank(10, (3, 7) if kind == "exp" else (5, 5)),
        subset_hash=subset_hash(train),
    )
    return with_label_noise(data, label_noise, subset_seed)


register_dataset(
    DataSetPart(
        name="digits-lt",
        build=lambda settings, progress: load_digits_lt(
            imbalance=settings.imbalance,
            kind=settings.kind,
            subset_seed=settings.subset_seed,
            label_noise=settings.label_noise,
        ),
        summary="1,797 handwritten digits of 8x8 pixels, cut to a long tail",
        settings=ImbalanceSettings,
        where="install scikit-learn, which includes it",
        recipe={
            **layer("definition of digits-lt", imbalance=50.0, kind="exp", subset_seed=0),
            **layer(
                "chosen for runs of a few seconds; not tuned (compared in docs/results.md)",
                model="resnet8",
                epochs=100,
                batch_size=32,
                lr=0.1,
                weight_decay=5e-4,
                warmup_epochs=5,
                lr_schedule="multistep",
                lr_milestones=(80, 90),
                lr_factors=(0.01, 0.0001),
                defer_epoch=80,
            ),
            **layer("two threads are slower than one on 8x8 images", threads=1),
        },
    )
)
