"""Checks before a run starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fastsam.distributed import World
from fastsam.longtail.base_optimizers.base import BASE_OPTIMIZERS
from fastsam.longtail.build import double_balance
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.data.catalog import GIVEN
from fastsam.longtail.errors import TrainingError, UsageError
from fastsam.longtail.finite import not_finite
from fastsam.longtail.objective import Objective
from fastsam.longtail.optimizers.base import OPTIMIZERS
from fastsam.longtail.training.ascent_batch import check_ascent_share
from fastsam.longtail.training.batches import FEWEST


def check_run(config: TrainConfig, world: World) -> None:
    """Check that a run has one stage, and its settings as :func:`check_stage` does.

    Raises:
        UsageError: also if the settings name a list of stages.
    """
    if config.stages != "none":
        raise UsageError(
            f"stages is {config.stages}, but a Trainer trains a single stage; call "
            "fastsam.longtail.fit_stages(config, ...) with the same arguments, or set stages=none"
        )
    check_stage(config, world)


def check_stage(config: TrainConfig, world: World) -> None:
    """Check settings against the number of processes, and warn if classes are balanced twice.

    Raises:
        UsageError: if the ranks of ``world`` cannot split the batches, or ``ascent_share`` selects fewer than
            2 images of one.
    """
    twice = double_balance(config)
    if twice is not None and world.rank == 0:
        warnings.warn(twice, stacklevel=3)
    _check_batch_size(config, world)
    if config.sync_batch_norm and not config.device.startswith("cuda"):
        raise UsageError(
            f"sync_batch_norm requires a CUDA device, but device is {config.device}; PyTorch's SyncBatchNorm "
            "does not run elsewhere. Train with device=cuda or sync_batch_norm=False"
        )
    if world.world_size > 1 and config.parallel == "fsdp2":
        _check_sharding(config)
    check_ascent_share(config, world)


def check_given(config: TrainConfig, data: LongTailData) -> None:
    """Raise :class:`UsageError` if the settings name another data set than ``data``."""
    if config.data not in (data.name, f"{GIVEN}{data.name}"):
        raise UsageError(
            f"config.data is {config.data!r}, but the data set is {data.name!r}; create the settings "
            f"with recipe('{GIVEN}{data.name}', ...)"
        )


def check_selection(config: TrainConfig, data: LongTailData) -> None:
    """Raise :class:`UsageError` if the best epoch is to be selected without a validation set."""
    if config.select == "best-validation" and data.validation is None:
        raise UsageError(
            f"select 'best-validation' requires a validation set, but {config.data} has none; hold out "
            "validation images or pass --select last"
        )


def check_weights(model: nn.Module, world: World, *, epoch: int, lr: float) -> None:
    """Raise :class:`TrainingError` if a weight is infinite or NaN after an epoch.

    Args:
        model: the network.
        world: the ranks that hold the network or parts of it.
        epoch: epoch, counted from 1, for the message.
        lr: learning rate of the epoch, for the message.
    """
    spoiled = not_finite(model, world)
    if spoiled is not None:
        raise TrainingError(
            f"{spoiled} of the network is infinite or NaN after epoch {epoch}; check the images for such "
            f"values or train again with a lower learning rate (now {lr:g})"
        )


def check_accumulation(config: TrainConfig, objective: Objective) -> None:
    """Raise :class:`UsageError` if a loss that compares the samples of a batch would see micro-batches."""
    if config.accumulate > 1 and objective.couples_batch:
        raise UsageError(
            f"accumulate {config.accumulate} splits a batch, but method {config.method} compares all of its "
            "images with each other; set accumulate=1 and use more processes to save memory"
        )


def _check_batch_size(config: TrainConfig, world: World) -> None:
    """Check that every micro-batch of every rank has at least 2 images."""
    fewest = FEWEST * world.world_size * config.accumulate
    if fewest > FEWEST and config.batch_size < fewest:
        raise UsageError(
            f"batch_size must be at least {fewest} for {world.world_size} process(es) and accumulate="
            f"{config.accumulate}, got {config.batch_size}; batch_size counts the images of all processes "
            "and micro-batches"
        )


def _check_sharding(config: TrainConfig) -> None:
    """Check that a sharded network can be trained with this configuration."""
    refused = {
        f"optimizer {config.optimizer}": not OPTIMIZERS[config.optimizer].shards,
        f"base_optimizer {config.base_optimizer}": config.base_optimizer is not None
        and not BASE_OPTIMIZERS[config.base_optimizer].shards,
        "ascent_scope local": config.ascent_scope == "local",
        "track_curvature": config.track_curvature is not None,
        "compile": config.compile,
        "channels_last": config.channels_last,  # FSDP2 splits contiguous weights only
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise UsageError(
                f"{what} requires whole weights on each process, but parallel fsdp2 splits them; choose "
                "parallel=ddp"
            )


def check_batches(
    batches: Sequence[NDArray[np.int64]], config: TrainConfig, images: int, world: World
) -> None:
    """Raise :class:`UsageError` if a batch of an epoch would have fewer than 2 images.

    Args:
        batches: indices of each batch of this rank.
        config: settings of the run.
        images: number of training images.
        world: the ranks of the run.
    """
    alone = min((len(batch) for batch in batches), default=0)
    if alone < FEWEST:
        raise UsageError(
            f"a process would have {alone} image(s) of a batch, but batch normalization and class weights "
            f"require at least {FEWEST}: {config.data} has {images} training images, batch_size is "
            f"{config.batch_size}, and there are {world.world_size} process(es); raise batch_size or use "
            "fewer processes"
        )
