"""The network of a run before its first step: its start weights, its head, and what is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.distributed import World
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import UsageError
from fastsam.longtail.features import collect_features
from fastsam.longtail.models import HEADS, Classifier
from fastsam.longtail.models.own import is_given
from fastsam.longtail.start import Start, configured_start, load_start
from fastsam.longtail.trainable import freeze, trained_count
from fastsam.longtail.training.engine import network_to_train
from fastsam.longtail.weight_files import read_vectors
from fastsam.text import notice

CLASS_MEANS, FRESH = "class-means", "fresh"
"""Values of the setting ``head_from`` that are not files."""


def begun_network(
    config: TrainConfig,
    data: LongTailData,
    device: torch.device,
    world: World,
    *,
    fresh: bool,
    start: Start | None = None,
    module: nn.Module | None = None,
    progress: bool = False,
) -> tuple[Classifier, dict[str, Any] | None]:
    """Build the network of a run on a device. All ranks must call this together.

    Args:
        config: settings of the run.
        data: data set of the run.
        device: device of this rank.
        world: the ranks of the run.
        fresh: whether the run begins: only then are start weights and the head loaded.
        start: weights to start from, instead of those that the settings name.
        module: your module for a network ``own:NAME``.
        progress: show progress.

    Returns:
        The network, and the record of its start; None for random initial weights.

    Raises:
        UsageError, CheckpointError: if the start weights or the settings do not fit the network.
    """
    network = network_to_train(config, data.num_classes, data.test.channels, device, module=module)
    record: dict[str, Any] | None = None
    if fresh:
        if start is None:
            with world.rank_0_first():  # it downloads what others then read
                start = configured_start(config)
        if start is None and is_given(config.model):
            own = network.features.state_dict().items()
            given = {k: value for k, value in own if f"features.{k}" not in network.added}
            start = Start(config.model, given)
        head = config.head_from
        if start is not None:
            record = load_start(
                network, start, data.class_names, keeps_head=head is None, head=config.head
            )
        if head not in (None, FRESH):
            vectors = _class_vectors(str(head), network, config, data, device, world, progress)
            _set_vectors(network, config, vectors)
            record = {**(record or {}), "head_from": head}
        if record is not None and progress:
            _report(record)
    freeze(network, config)
    if progress and network.frozen:
        notice(trained_count(network))
    return network, record


def _report(record: dict[str, Any]) -> None:
    chosen = "head_from" in record
    names = [n for n in record.get("left_out", ()) if not (chosen and n.startswith("head."))]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notice(f"start from {record['name']}: left out {', '.join(names[:3])}{more}")
    head = [name for name in record.get("fresh", ()) if name.startswith("head.")]
    if head and not chosen:
        notice(f"start from {record['name']}: the head has random initial weights")


def _class_vectors(
    head: str,
    network: Classifier,
    config: TrainConfig,
    data: LongTailData,
    device: torch.device,
    world: World,
    progress: bool,
) -> Tensor:
    """Return one vector per class, ``[C, D]``: from a file, or the class means divided by their norms."""
    shape = (data.num_classes, network.feature_width)
    if head != CLASS_MEANS:
        vectors = read_vectors(head)
        if vectors.shape != shape:
            raise UsageError(
                f"head_from {head} has {' x '.join(map(str, vectors.shape))} numbers, but {shape[0]} classes "
                f"with {shape[1]} features need {shape[0]} x {shape[1]}; pass one vector per class"
            )
        return vectors
    vectors = torch.zeros(shape, device=device)
    if world.rank == 0:
        features = collect_features(
            network,
            data.train,
            device,
            batch_size=config.batch_size,
            precision=config.precision,
            description="class means",
            progress=progress,
        )
        vectors += functional.normalize(features.class_means(shape[0]), dim=1).to(vectors)
    world.all_reduce([vectors])  # the same bits on all ranks
    return vectors


def _set_vectors(network: Classifier, config: TrainConfig, vectors: Tensor) -> None:
    part = HEADS[config.head]
    if part.set_vectors is None:
        raise UsageError(
            f"head {config.head} has no vectors of classes, which head_from sets; omit head_from"
        )
    part.set_vectors(network.head, vectors.to(next(network.parameters())))
