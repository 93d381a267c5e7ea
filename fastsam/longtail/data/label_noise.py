"""Label noise: training labels that are replaced by wrong ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.subset import subset_hash
from fastsam.longtail.data.tensor_images import TensorImages
from fastsam.longtail.seeds import Stream, numpy_generator


def noisy_labels(
    targets: NDArray[np.int64], num_classes: int, share: float, seed: int
) -> NDArray[np.int64]:
    """Replace a fraction of the labels by other classes, uniformly at random.

    This is the symmetric noise of Zhang et al. (ICLR 2017) and Foret et al. (ICLR 2021, section 3.3), except
    that a replaced label is always wrong. The rarer a class, the larger the fraction of images with its label
    that belong to other classes.

    Args:
        targets: true classes, int64 ``[N]``.
        num_classes: number of classes C.
        share: fraction of the N labels that are replaced, rounded to whole images.
        seed: seed of the noise.

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
    """Return a data set with label noise in its training set; see :func:`noisy_labels`.

    Counts, class weights and priors are computed from the noisy labels, as they would be in practice. Groups,
    validation set and test set do not change.

    Args:
        data: a data set in memory.
        share: fraction of the training labels that are replaced; 0 returns ``data``.
        seed: seed of the noise.
    """
    if share == 0:
        return data
    train = data.train
    if not isinstance(train, TensorImages):
        raise AssertionError("label noise requires images in memory")
    labels = noisy_labels(train.targets, data.num_classes, share, seed)
    wrong = int((labels != train.targets).sum())
    digits = np.frombuffer(bytes.fromhex(data.subset_hash), dtype="<i8").astype(np.int64)
    return replace(
        data,
        train=replace(train, targets=labels),
        subset_hash=subset_hash(np.concatenate([digits, labels])),
        notes=(*data.notes, f"label noise: {wrong} of {len(labels)} training labels were replaced"),
    )
