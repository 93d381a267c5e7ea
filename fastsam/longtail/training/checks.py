"""What a run is refused for before it begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastsam.distributed import World
from fastsam.longtail.build import double_adjustment
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError
from fastsam.longtail.training.ascent_batch import check_ascent_share


def check_run(config: TrainConfig, world: World) -> None:
    """Warn if logits are adjusted twice, and refuse batches that are too small or cannot be shared out.

    Raises:
        UsageError: the processes of ``world`` cannot share the batches, or ``ascent_share`` leaves fewer
            than 2 images of one.
    """
    twice = double_adjustment(config)
    if twice is not None and world.rank == 0:
        warnings.warn(twice, stacklevel=3)
    if world.world_size > 1:
        _check_processes(config, world)
    check_ascent_share(config, world)


def _check_processes(config: TrainConfig, world: World) -> None:
    """Refuse what several processes cannot do together."""
    if config.batch_size % world.world_size:
        raise UsageError(
            f"batch_size is that of all processes together: {config.batch_size} is not a multiple "
            f"of {world.world_size}"
        )
    if config.corrupt == "skip":
        raise UsageError("several processes need --corrupt stop: they must see as many batches")


def check_batches(
    batches: Sequence[NDArray[np.int64]], config: TrainConfig, images: int, world: World
) -> None:
    """Raise :class:`UsageError` if a batch of an epoch would have fewer than 2 images.

    Args:
        batches: indices of each batch of this process.
        config: settings of the run.
        images: number of training images.
        world: the processes of the run.
    """
    alone = min((len(batch) for batch in batches), default=0)
    if alone < 2:
        raise UsageError(
            f"a batch would have {alone} image, of which batch normalization has no variance and "
            f"class weights no effect: {config.data} has {images} training images, batch_size is "
            f"{config.batch_size} and processes are {world.world_size}; give every process at least 2 "
            "images of a batch"
        )
