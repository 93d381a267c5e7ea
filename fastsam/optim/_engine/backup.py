"""Memory for the original weights while they are perturbed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastsam.kernels.table import is_dense

_ALIGNMENT = 64  # bytes: a cache line, which the CPU kernels write at once; CUDA's need 16

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_shared_memory(weights: Sequence[Tensor]) -> None:
    """Raise ValueError if weights share memory: a weight that is perturbed twice cannot be restored.

    Views with gaps may interleave without sharing, so of these only the first addresses are compared. Places
    are counted within a storage, because not every device has addresses in bytes (MPS has none).
    """
    ranges: dict[tuple[torch.device, int], list[tuple[int, int, torch.Size]]] = defaultdict(list)
    for weight in weights:
        if weight.numel() == 0 or weight.is_meta:
            continue
        if any(
            stride == 0 and size > 1
            for stride, size in zip(weight.stride(), weight.shape, strict=True)
        ):
            raise _shares(weight.shape, "itself")
        start, elements = int(weight.storage_offset()), weight.numel() if is_dense(weight) else 1
        storage = ranges[weight.device, weight.untyped_storage().data_ptr()]
        size = weight.element_size()
        storage.append((start * size, (start + elements) * size, weight.shape))
    for storage in ranges.values():
        for (_, end, _), (begin, _, shape) in pairwise(sorted(storage)):
            if begin < end:
                raise _shares(shape, "another parameter")


def _shares(shape: torch.Size, other: str) -> ValueError:
    return ValueError(
        f"a parameter of shape {tuple(shape)} shares memory with {other}: SAM could not restore it "
        "after the ascent. Tie modules by assigning the same Parameter object to both."
    )


def backup_memory(weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a flat tensor with room for all ``weights``, and aligned views of it shaped like the weights."""
    element = weights[0].element_size()
    per_line = _ALIGNMENT // element
    offsets = []
    total = 0
    for weight in weights:
        offsets.append(total)
        total += -(-weight.numel() // per_line) * per_line
    backup = torch.empty(max(total, 1), dtype=weights[0].dtype, device=weights[0].device)
    views = [
        backup.as_strided(weight.shape, weight.stride(), offset)
        for weight, offset in zip(weights, offsets, strict=True)
    ]
    return backup, views


def exchange_bits(one: Tensor, other: Tensor) -> None:
    """Swap two tensors of one dtype and shape in place, without a temporary: XOR on their integer bits."""
    ours, theirs = (each.detach().view(_INTEGERS[each.element_size()]) for each in (one, other))
    ours.bitwise_xor_(theirs)
    theirs.bitwise_xor_(ours)
    ours.bitwise_xor_(theirs)
