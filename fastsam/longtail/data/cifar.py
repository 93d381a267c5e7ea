"""``cifar10-lt`` and ``cifar100-lt``: the long-tailed CIFAR of Cao et al. (NeurIPS 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsam.extras import requires_extra
from fastsam.longtail.data.catalog import (
    DataSetPart,
    ImbalanceSettings,
    RootSettings,
    register_dataset,
)
from fastsam.longtail.data.cifar_like import made_long_tailed
from fastsam.longtail.data.dataset import LongTailData, TensorImages
from fastsam.longtail.data.shared_recipes import CIFAR, PAPER
from fastsam.longtail.data.subset import ImbalanceKind
from fastsam.longtail.errors import DataError
from fastsam.longtail.settings import layer, setting

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def load_cifar_lt(
    num_classes: int,
    root: Path,
    *,
    imbalance: float = 100.0,
    kind: ImbalanceKind = "exp",
    subset_seed: int = 0,
    download: bool = False,
) -> LongTailData:
    """CIFAR-10 or CIFAR-100 with a long tail; the test set is the full, balanced one.

    With ``subset_seed=0`` the training images are, index for index, those of Cao et al. The splits
    head, mid and tail are the classes 0-2, 3-6, 7-9 and 0-35, 36-70, 71-99 (step: halves).

    Args:
        num_classes: 10 or 100.
        root: folder with ``cifar-10-batches-py`` or ``cifar-100-python``.
        imbalance: largest over smallest class count.
        kind: exponential or step profile.
        subset_seed: seed of the selection.
        download: fetch the archive into ``root`` if it is not there.

    Raises:
        DataError: if files are missing or damaged.
    """
    with requires_extra("longtail", "CIFAR"):
        from torchvision.datasets import CIFAR10, CIFAR100

    reader: Any = {10: CIFAR10, 100: CIFAR100}[num_classes]
    try:
        parts = [reader(str(root), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise DataError(f"CIFAR-{num_classes} is missing or damaged in {root}: {error}") from error
    sets = [
        TensorImages(
            torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))),
            np.asarray(part.targets, dtype=np.int64),
            white=255.0,
            mean=_MEAN,
            std=_STD,
        )
        for part in parts
    ]
    train, test = sets
    return made_long_tailed(
        f"cifar{num_classes}-lt",
        tuple(parts[0].classes),
        train,
        test,
        imbalance=imbalance,
        kind=kind,
        subset_seed=subset_seed,
    )


@dataclass(frozen=True, kw_only=True)
class CIFARSettings(ImbalanceSettings, RootSettings):
    """Settings of long-tailed CIFAR."""

    download: bool = setting("fetch the archive if it is not there", default=False, place=True)


def _load(num_classes: int, settings: CIFARSettings, progress: bool) -> LongTailData:
    return load_cifar_lt(
        num_classes,
        settings.root,
        imbalance=settings.imbalance,
        kind=settings.kind,
        subset_seed=settings.subset_seed,
        download=settings.download,
    )


for _classes in (10, 100):
    register_dataset(
        DataSetPart(
            name=f"cifar{_classes}-lt",
            build=partial(_load, _classes),
            summary=f"CIFAR-{_classes} cut to a long tail",
            settings=CIFARSettings,
            where=f"cifar-{_classes}-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html; "
            "`fastsam train --download` fetches it",
            recipe={
                **layer(f"{PAPER} Table 1", imbalance=100.0, kind="exp", subset_seed=0),
                **CIFAR,
            },
        )
    )
