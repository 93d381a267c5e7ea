"""Passes over the data: batches that are cut, or joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.data import Batches
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.structure import common_length, map_tensors, sample_count

JOINED_SAMPLES = 64
"""Maximum number of samples of joined batches, if the graphs of all batches are held."""


def pieces(batches: Batches, micro_batch: int | None) -> Batches:
    """Split the batches into passes of at most ``micro_batch`` samples.

    A batch whose tensors have different lengths, such as a graph with its edges, stays whole.
    """
    if micro_batch is None:
        return batches

    def cut(batch: Any) -> list[Any]:
        if common_length(batch) is None:
            return [batch]

        def piece(start: int) -> Any:
            def rows(tensor: Tensor) -> Tensor:
                return tensor[start : start + micro_batch]

            return map_tensors(rows, batch)

        return [piece(start) for start in range(0, sample_count(batch), micro_batch)]

    return batches.mapped(cut)


def splittable(batches: Batches, option: str) -> Batches:
    """Return the same batches; to read one that cannot be split along its first dimension is an error.

    Args:
        batches: the batches.
        option: the option that requires them to be split, and what to do instead.

    Raises:
        ValueError: when a batch is read whose tensors have different lengths.
    """

    def checked(batch: Any) -> list[Any]:
        if common_length(batch) is None:
            raise ValueError(
                "the tensors of a batch have no common first dimension, so the batch cannot be split, "
                f"which {option}"
            )
        return [batch]

    return batches.mapped(checked)


def joined(batches: Batches, samples: int) -> Batches:
    """Join neighboring batches ``(inputs, targets)`` to passes of at most ``samples`` samples.

    The operator is a sum over samples, so this does not change it; larger passes have less overhead.
    """
    if not batches.held:
        return batches
    groups: list[list[Any]] = []
    for batch in batches:
        whole = sample_count(batch) + sum(sample_count(other) for other in (groups or [[]])[-1])
        if groups and whole <= samples and _joinable(groups[-1][0]) == _joinable(batch) != ():
            groups[-1].append(batch)
        else:
            groups.append([batch])

    def join(group: list[Any]) -> Any:
        return group[0] if len(group) == 1 else tuple(map(torch.cat, zip(*group, strict=True)))

    return replace(batches, source=[join(group) for group in groups])


def _joinable(batch: Any) -> tuple[Any, ...]:
    """Return the properties that must be equal to join two batches; () if a batch cannot be joined."""
    pair = isinstance(batch, (tuple, list)) and all(isinstance(item, Tensor) for item in batch)
    if not pair or any(item.ndim == 0 or len(item) != len(batch[0]) for item in batch):
        return ()
    return tuple((item.shape[1:], item.dtype, item.device) for item in batch)


def cuttable(loss: PureLoss, batch: Any) -> bool:
    """Return whether a batch may be split along its first dimension."""
    return loss.model_loss.separable and sample_count(batch) > 1


def head(batch: Any, count: int) -> Any:
    """Return the first ``count`` samples of a batch."""
    return (
        map_tensors(lambda tensor: tensor[:count], batch) if sample_count(batch) > count else batch
    )
