"""Batches of one read of a loader, held in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.curvature.structure import (
    is_empty,
    map_tensors,
    refuse_unreadable,
    sample_count,
    sample_digests,
    tensors_of,
)


class ReadBatches:
    """The batches of one read, held up to a memory limit, with the digests of their samples.

    A loader may fill the same memory for every batch. The batches that are held then change while the
    next ones are read.

    Args:
        memory_limit: bytes of batches that may be held.
        copied: whether to hold copies of the tensors.

    Attributes:
        held: the batches; None if they exceed ``memory_limit``.
        digests: numbers of samples by digest, taken when each batch was read.
        samples: total number of samples.
    """

    def __init__(self, memory_limit: int, *, copied: bool = False) -> None:
        self._limit = memory_limit
        self._copied = copied
        self._size = 0
        self.held: list[Any] | None = []
        self.digests: Counter[bytes] = Counter()
        self.samples = 0

    def add(self, batch: Any) -> None:
        """Count a batch and hold it if there is room; skip one without samples.

        Raises:
            TypeError: the batch contains data that cannot be compared.
        """
        refuse_unreadable(batch)
        if is_empty(batch):
            return
        self.digests.update(sample_digests(batch))
        self.samples += sample_count(batch)
        self._size += sum(x.numel() * x.element_size() for x in tensors_of(batch))
        if self._size > self._limit:
            self.held = None
        if self.held is not None:
            self.held.append(map_tensors(torch.clone, batch) if self._copied else batch)

    def is_overwritten(self) -> bool:
        """Return whether a batch that is held has changed since it was read."""
        if self.held is None or not _overlap(self.held):
            return False
        return self.digests != Counter(digest for x in self.held for digest in sample_digests(x))


def _overlap(batches: Sequence[Any]) -> bool:
    """Return whether tensors of two batches may share memory.

    Interleaved views, such as ``data[0::2]`` and ``data[1::2]``, count as shared.
    """
    ranges = []
    for index, batch in enumerate(batches):
        for tensor in tensors_of(batch):
            if tensor.layout is torch.strided and tensor.numel():
                start = tensor.data_ptr()
                ranges.append((start, start + _span(tensor), index))
    furthest, owner = 0, -1
    for start, end, index in sorted(ranges):
        if start < furthest and index != owner:
            return True
        if end > furthest:
            furthest, owner = end, index
    return False


def _span(tensor: Tensor) -> int:
    """Return the bytes from the first to the last element of a tensor."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
