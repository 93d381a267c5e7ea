"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from fastsam.longtail.data.dataset import LongTailData, check_every_class
from fastsam.longtail.data.digits import load_digits_lt
from fastsam.longtail.data.subset import ImbalanceKind
from fastsam.longtail.errors import unknown

Loader = Callable[[float, ImbalanceKind, int], LongTailData]


def _digits(imbalance: float, kind: ImbalanceKind, subset_seed: int) -> LongTailData:
    return load_digits_lt(imbalance=imbalance, kind=kind, subset_seed=subset_seed)


DATASETS: dict[str, Loader] = {"digits-lt": _digits}


def load_dataset(
    name: str, *, imbalance: float = 50.0, kind: ImbalanceKind = "exp", subset_seed: int = 0
) -> LongTailData:
    """The data set called ``name``, checked: every class has at least one training image.

    Args:
        name: one of :data:`DATASETS`.
        imbalance: imbalance factor of the sets made long-tailed here.
        kind: profile of the imbalance.
        subset_seed: seed of the selection.

    Raises:
        UsageError: for an unknown name or an impossible imbalance.
        DataError: for missing or damaged files.
    """
    if name not in DATASETS:
        raise unknown("data", name, DATASETS)
    data = DATASETS[name](imbalance, kind, subset_seed)
    check_every_class(data.counts, f"the training set of {name}")
    return data
