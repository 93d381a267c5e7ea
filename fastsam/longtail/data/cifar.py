"""``cifar10-lt`` and ``cifar100-lt``: the long-tailed CIFAR of Cao et al. (NeurIPS 2019)."""

from __future__ import annotations

from functools import partial

from fastsam.longtail.data.catalog import DataSetPart, register_dataset
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.shared_recipes import CIFAR, PAPER
from fastsam.longtail.data.torchvision_sets import DownloadSettings, load_torchvision_lt
from fastsam.longtail.settings import layer


def _load(num_classes: int, settings: DownloadSettings, progress: bool) -> LongTailData:
    """Load CIFAR. With ``subset_seed=0`` the training images are those of Cao et al."""
    name = f"cifar{num_classes}-lt"
    return load_torchvision_lt(f"CIFAR{num_classes}", settings, name=name, progress=progress)


for _classes in (10, 100):
    register_dataset(
        DataSetPart(
            name=f"cifar{_classes}-lt",
            build=partial(_load, _classes),
            summary=f"CIFAR-{_classes} cut to a long tail",
            settings=DownloadSettings,
            where=f"pass --download, or download cifar-{_classes}-python.tar.gz from "
            "www.cs.toronto.edu/~kriz/cifar.html",
            recipe={
                **layer(f"{PAPER} Table 1", imbalance=100.0, kind="exp", subset_seed=0),
                **CIFAR,
            },
        )
    )
