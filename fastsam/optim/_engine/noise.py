"""Normal noise on many tensors at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.kernels.noise import add_noise
from fastsam.kernels.table import TensorTable
from fastsam.upload import upload


def add_normal(
    tensors: Sequence[Tensor], deviations: Sequence[Tensor], *, seed: int, position: int
) -> None:
    """Add normal noise to tensors in place, one native launch for each device and dtype.

    The noise depends on seed, position, place in ``tensors`` and place in memory alone: the same
    bits on any number of threads, and to rounding the same on every device.

    Args:
        tensors: dense, of any shape; changed in place.
        deviations: standard deviations, ``[rows]`` for each tensor: one for all of it, or one for each
            slice along the first dimension. The same object may serve many tensors: it is moved to their
            device once.
        seed: seed of the run, below 2^63.
        position: which draw of the run.
    """
    members: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            members[tensor.device, tensor.dtype].append(index)
    for (device, _), chosen in members.items():
        count = len(chosen)
        distinct = {id(deviations[index]): deviations[index] for index in chosen}
        table = TensorTable(
            [tensors[index] for index in chosen], groups=[0] * count, adaptive=[False] * count
        )
        moved = {
            key: upload(deviation.to(table.sum_dtype), device)
            for key, deviation in distinct.items()
        }
        add_noise(
            table,
            [moved[id(deviations[index])] for index in chosen],
            upload(torch.tensor([seed, position]), device),
            streams=chosen,
        )
