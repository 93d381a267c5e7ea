"""Long-tailed data sets: selection, reading and augmentation of images."""

from fastsam.longtail.data.augmentations import (
    AUGMENTATIONS,
    AugmentationPart,
    register_augmentation,
    register_transform,
)
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.catalog import (
    DATASETS,
    DataSetPart,
    load_dataset,
    register_dataset,
)
from fastsam.longtail.data.dataset import Images, LongTailData
from fastsam.longtail.data.digits import load_digits_lt
from fastsam.longtail.data.groups import GROUPS, groups_by_count, groups_by_rank
from fastsam.longtail.data.preprocessing import Preprocessing
from fastsam.longtail.data.subset import (
    IMBALANCE_KINDS,
    ImbalanceKind,
    longtail_counts,
    longtail_indices,
    shuffled_by_class,
    subset_hash,
)
from fastsam.longtail.data.tensor_images import TensorImages
from fastsam.longtail.data.torch_dataset import DatasetImages, from_datasets

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "GROUPS",
    "IMBALANCE_KINDS",
    "AugmentationPart",
    "Batch",
    "DataSetPart",
    "DatasetImages",
    "Draw",
    "Images",
    "ImbalanceKind",
    "LongTailData",
    "Preprocessing",
    "TensorImages",
    "from_datasets",
    "groups_by_count",
    "groups_by_rank",
    "load_dataset",
    "load_digits_lt",
    "longtail_counts",
    "longtail_indices",
    "register_augmentation",
    "register_dataset",
    "register_transform",
    "shuffled_by_class",
    "subset_hash",
]
