"""Wrong labels, made on purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.dataset import LongTailData, TensorImages
from fastsam.longtail.data.subset import subset_hash
from fastsam.longtail.seeds import Stream, numpy_generator


def noisy_labels(
    targets: NDArray[np.int64], num_classes: int, share: float, seed: int
) -> NDArray[np.int64]:
    """Return the labels with a share of them replaced by another class, uniformly at random.

    This is symmetric noise as of Zhang et al. (ICLR 2017) and Foret et al. (ICLR 2021, section 3.3), but a
    label that is replaced is always wrong. The rarer a class is, the larger the share of wrong images
    among those that have its label.

    Args:
        targets: true classes, int64 ``[N]``.
        num_classes: number of classes C.
        share: share of the N labels that are replaced, rounded to whole images.
        seed: seed of the choice.

    Example:
        >>> labels = noisy_labels(np.zeros(10, dtype=np.int64), 3, share=0.4, seed=0)
        >>> int((labels != 0).sum())
        4
    """
    generator = numpy_generator(seed, Stream.LABELS)
    count = round(share * len(targets))
    chosen = generator.choice(len(targets), size=count, replace=False)
    labels = targets.copy()
    labels[chosen] = (
        targets[chosen] + generator.integers(1, num_classes, size=count)
    ) % num_classes
    return labels


def with_label_noise(data: LongTailData, share: float, seed: int) -> LongTailData:
    """Return a data set with wrong labels in its training set; see :func:`noisy_labels`.

    Counts, class weights and priors are then those of the noisy labels, as they would be in practice. Head,
    mid and tail, validation and test stay as they are.

    Args:
        data: the data set, in memory.
        share: share of the training labels that are replaced; 0 returns ``data``.
        seed: seed of the choice.
    """
    if share == 0:
        return data
    train = data.train
    if not isinstance(train, TensorImages):
        raise AssertionError("only sets in memory are cut here")
    labels = noisy_labels(train.targets, data.num_classes, share, seed)
    wrong = int((labels != train.targets).sum())
    digits = np.frombuffer(bytes.fromhex(data.subset_hash), dtype="<i8").astype(np.int64)
    return replace(
        data,
        train=replace(train, targets=labels),
        subset_hash=subset_hash(np.concatenate([digits, labels])),
        notes=(*data.notes, f"{wrong} of {len(labels)} training labels were made wrong on purpose"),
    )
