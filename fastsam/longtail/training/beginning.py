"""The network of a run before its first step: its start weights, its head, and what is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.distributed import World
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import UsageError
from fastsam.longtail.features import collect_features
from fastsam.longtail.models import HEADS, Classifier, pretrained_normalization
from fastsam.longtail.models.own import is_given
from fastsam.longtail.start import Start, configured_start, load_start
from fastsam.longtail.trainable import freeze, trained_count
from fastsam.longtail.training.engine import network_to_train
from fastsam.longtail.weight_files import read_vectors
from fastsam.text import notice

CLASS_MEANS, FRESH = "class-means", "fresh"
"""Values of the setting ``head_from`` that are not files."""
_ANOTHER = 0.1
"""Difference, averaged over the channels, from which on a mean or a deviation counts as another one. Sets of
photographs differ by less than 0.05."""


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
    network = network_to_train(config, data, device, module=module)
    record: dict[str, Any] | None = None
    if fresh:
        if start is None:
            if world.rank == 0:
                _compare_normalization(config, data)
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
        vectors = file_vectors(network, config, data.num_classes)
        if head == CLASS_MEANS:
            vectors = _class_means(network, config, data, device, world, progress)
        if vectors is not None:
            set_vectors = HEADS[config.head].set_vectors
            if set_vectors is None:
                raise AssertionError("file_vectors has checked it")
            set_vectors(network.head, vectors.to(next(network.parameters())))
            record = {**(record or {}), "head_from": head}
        if record is not None and progress:
            _report(record, network)
    freeze(network, config)
    if progress and network.frozen:
        notice(trained_count(network))
    return network, record


def _compare_normalization(config: TrainConfig, data: LongTailData) -> None:
    """Warn if a pretrained network expects images of clearly another mean or standard deviation."""
    pretrained, prepared = config.flat().get("pretrained"), data.test.preprocessing
    if pretrained is None or prepared is None:
        return
    expected = pretrained_normalization(config.model, pretrained)
    pairs = ((expected.mean, prepared.mean), (expected.std, prepared.std))
    if any(abs(_mean(one) - _mean(other)) > _ANOTHER for one, other in pairs):
        warnings.warn(
            f"{config.model} was pretrained on images normalized by mean {expected.mean} and standard "
            f"deviation {expected.std}, but those of {data.name} are normalized by {prepared.mean} and "
            f"{prepared.std}; for your own images, pass normalization=network, for others "
            "data=data.normalized(mean, std) to the Trainer",
            stacklevel=4,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _report(record: dict[str, Any], network: Classifier) -> None:
    chosen = "head_from" in record
    names = [n for n in record.get("left_out", ()) if not (chosen and n.startswith("head."))]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notice(f"start from {record['name']}: left out {', '.join(names[:3])}{more}")
    own = network.state_dict()
    for name, channels in record.get("adapted", {}).items():
        notice(
            f"start from {record['name']}: {name} adapted from {channels} to {own[name].shape[1]} channels"
        )
    head = {k for k, v in own.items() if k.startswith("head.") and v.ndim}
    if (
        not chosen and head and head.issubset(record.get("fresh", ()))
    ):  # else it took over another head
        notice(f"start from {record['name']}: the head has random initial weights")


def file_vectors(network: Classifier, config: TrainConfig, num_classes: int) -> Tensor | None:
    """Return the vectors of the classes in the file that ``head_from`` names, ``[C, D]``; None without one.

    Raises:
        UsageError: if the head has no vectors of classes, there is no such file, or it has another shape.
    """
    head = config.head_from
    if head in (None, FRESH):
        return None
    if HEADS[config.head].set_vectors is None:
        raise UsageError(
            f"head {config.head} has no vectors of classes, which head_from sets; omit head_from"
        )
    if head == CLASS_MEANS:
        return None
    vectors, shape = read_vectors(str(head)), (num_classes, network.feature_width)
    if vectors.shape != shape:
        raise UsageError(
            f"head_from {head} has {' x '.join(map(str, vectors.shape))} numbers, but {shape[0]} classes "
            f"with {shape[1]} features need {shape[0]} x {shape[1]}; pass one vector per class"
        )
    return vectors


def _class_means(
    network: Classifier,
    config: TrainConfig,
    data: LongTailData,
    device: torch.device,
    world: World,
    progress: bool,
) -> Tensor:
    """Return the class means of the features divided by their norms, ``[C, D]``."""
    shape = (data.num_classes, network.feature_width)
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
