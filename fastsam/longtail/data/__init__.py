"""Long-tailed data sets: which images form them, how they are read and augmented."""

from fastsam.longtail.data.catalog import DATASETS, DataOptions, load_dataset
from fastsam.longtail.data.dataset import (
    GROUPS,
    Batch,
    Images,
    LongTailData,
    TensorImages,
    groups_by_count,
    groups_by_rank,
)
from fastsam.longtail.data.digits import load_digits_lt
from fastsam.longtail.data.subset import (
    IMBALANCE_KINDS,
    ImbalanceKind,
    longtail_counts,
    longtail_indices,
    shuffled_by_class,
    subset_hash,
)

__all__ = [
    "DATASETS",
    "GROUPS",
    "IMBALANCE_KINDS",
    "Batch",
    "DataOptions",
    "Images",
    "ImbalanceKind",
    "LongTailData",
    "TensorImages",
    "groups_by_count",
    "groups_by_rank",
    "load_dataset",
    "load_digits_lt",
    "longtail_counts",
    "longtail_indices",
    "shuffled_by_class",
    "subset_hash",
]
