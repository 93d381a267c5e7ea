"""The data set of a run: the one that was passed, or that of the settings."""

from __future__ import annotations

from fastsam.distributed import World
from fastsam.longtail.build import load_configured
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.training.checks import check_given


def given_or_loaded(
    config: TrainConfig, data: LongTailData | None, world: World, *, progress: bool
) -> LongTailData:
    """Return the data set of a run. All ranks must call this together.

    Args:
        config: settings of the run.
        data: the data set that was passed; None to load that of the settings.
        world: the ranks of the run.
        progress: show progress.

    Raises:
        UsageError: if the settings name another data set than ``data``.
        DataError: if the data are damaged.
    """
    if data is not None:
        check_given(config, data)
        return data
    with world.rank_0_first():  # it downloads and caches what others then read
        return load_configured(config, progress=progress)
