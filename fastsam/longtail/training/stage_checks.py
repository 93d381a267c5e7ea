"""Checks of the stages of a run before the first one is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fastsam.distributed import World
from fastsam.longtail.build import build_network, build_objective, build_optimizer
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.own import is_given
from fastsam.longtail.norms import NormLimits
from fastsam.longtail.precision import check_tf32
from fastsam.longtail.stage_plan import PlannedStage
from fastsam.longtail.stages import STAGES
from fastsam.longtail.trainable import freeze
from fastsam.longtail.training.batches import EpochBatches
from fastsam.longtail.training.beginning import file_vectors
from fastsam.longtail.training.checks import (
    check_accumulation,
    check_batches,
    check_selection,
    check_stage,
)
from fastsam.longtail.training.compiled import check_compiler
from fastsam.longtail.training.curvature import measured_classes
from fastsam.longtail.training.recomputation import recomputed_blocks


def check_start(config: TrainConfig) -> None:
    """Raise :class:`UsageError` if a list for pretrained networks would begin with random weights."""
    if not STAGES[config.stages].needs_weights:
        return
    if config.init is None and config.pretrained is None and not is_given(config.model):
        raise UsageError(
            f"stages {config.stages} starts from pretrained weights, but the network has random weights; "
            "pass --init FILE, or --pretrained default with a torchvision or timm network"
        )


def check_settings(stages: Sequence[PlannedStage], world: World) -> None:
    """Check the settings of stages against the number of processes, and warn of double adjustments.

    Raises:
        UsageError: see :func:`fastsam.longtail.training.checks.check_stage`.
    """
    for stage in stages:
        with _named(stage):
            check_stage(stage.config, world)


def check_later(
    stages: Sequence[PlannedStage],
    data: LongTailData,
    world: World,
    device: torch.device,
    *,
    module: nn.Module | None = None,
) -> None:
    """Check stages that are trained after others as a :class:`Trainer` checks them when they begin.

    Args:
        stages: the stages, without the one that is trained first.
        data: data set of the run.
        world: the ranks of the run.
        device: device of this rank.
        module: module of a network ``own:NAME``.

    Raises:
        UsageError: if a setting does not fit the network, the data set, the device, or another setting.
    """
    for stage in stages:
        with _named(stage):
            _check(stage.config, data, world, device, module)


def _check(
    config: TrainConfig,
    data: LongTailData,
    world: World,
    device: torch.device,
    module: nn.Module | None,
) -> None:
    check_tf32(config.tf32, device)
    if config.compile:
        check_compiler(device)
    if config.track_curvature is not None:
        measured_classes(config, data)
    check_selection(config, data)
    objective = build_objective(config, data.counts, data.groups)
    check_accumulation(config, objective)
    batches = EpochBatches.of_run(config, data, objective.views, torch.device("cpu"), world)
    check_batches(batches.indices(1), config, len(data.train), world)
    images = data.test
    network = build_network(
        config, data.num_classes, images.channels, size=images.frame.size, module=module
    )
    file_vectors(network, config, data.num_classes)
    freeze(network, config)
    NormLimits.of_run(config, network, None)
    build_optimizer(config, network, steps_per_epoch=1)
    if config.checkpoint_activations:
        recomputed_blocks(network, config.model)


@contextmanager
def _named(stage: PlannedStage) -> Iterator[None]:
    """Name the stage in errors inside the context."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"stage {stage.name}: {error}") from error
