"""What the long-tailed sets of 32x32 colour images share: subset rule, splits, augmentation."""

from __future__ import annotations

from fastsam.longtail.data.augment import Compose, RandomCrop, RandomHorizontalFlip
from fastsam.longtail.data.dataset import LongTailData, TensorImages
from fastsam.longtail.data.groups import groups_by_rank
from fastsam.longtail.data.subset import (
    ImbalanceKind,
    longtail_counts,
    longtail_indices,
    subset_hash,
)

_BOUNDARIES = {10: (3, 7), 100: (36, 71)}


def made_long_tailed(
    name: str,
    class_names: tuple[str, ...],
    train: TensorImages,
    test: TensorImages,
    *,
    imbalance: float,
    kind: ImbalanceKind,
    subset_seed: int,
    validation: TensorImages | None = None,
    unseen: TensorImages | None = None,
) -> LongTailData:
    """A balanced set cut to a long tail as Cao et al. (NeurIPS 2019) cut CIFAR.

    Args:
        name: name on the command line.
        class_names: one per class, head to tail; 10 or 100.
        train: the balanced training images.
        test: the balanced test images.
        imbalance: largest over smallest class count.
        kind: exponential or step profile.
        subset_seed: seed of the selection.
        validation: balanced images for choosing hyper-parameters.
        unseen: a second test set, of another distribution.
    """
    num_classes = len(class_names)
    counts = longtail_counts(len(train) // num_classes, num_classes, imbalance, kind)
    chosen = longtail_indices(train.targets, counts, subset_seed)
    half = num_classes // 2
    return LongTailData(
        name=name,
        train=train.select(chosen, augmentation=Compose((RandomCrop(4), RandomHorizontalFlip()))),
        validation=validation,
        test=test,
        class_names=class_names,
        groups=groups_by_rank(
            num_classes, _BOUNDARIES[num_classes] if kind == "exp" else (half, half)
        ),
        subset_hash=subset_hash(chosen),
        unseen=unseen,
    )
