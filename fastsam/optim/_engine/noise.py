"""Normal noise on many tensors at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.kernels.noise import add_noise
from fastsam.kernels.table import TensorTable, has_slices_in_order, is_dense
from fastsam.upload import upload


def add_normal(
    tensors: Sequence[Tensor], deviations: Sequence[Tensor], *, seed: int, position: int
) -> None:
    """Add normal noise to tensors in place, with one native launch per device and dtype.

    The noise of an element depends only on ``seed``, ``position``, the index in ``tensors`` and the offset in
    memory; that of a contiguous copy if there is a standard deviation per slice and the slices are not
    consecutive in memory. It is bitwise equal for any number of threads, and equal up to rounding on all
    devices.

    Args:
        tensors: dense tensors of any shape; changed in place.
        deviations: standard deviations of each tensor, ``[rows]``: one for the whole tensor, or one for each
            slice along the first dimension. An object that occurs repeatedly is copied to a device once.
        seed: seed of the run, below 2^63.
        position: index of this call within the run.
    """
    members: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    in_order = [
        tensor
        if is_dense(tensor) and has_slices_in_order(tensor, len(deviation))
        else tensor.resolve_neg().contiguous()
        for tensor, deviation in zip(tensors, deviations, strict=True)
    ]
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            members[tensor.device, tensor.dtype].append(index)
    for (device, _), chosen in members.items():
        count = len(chosen)
        distinct = {id(deviations[index]): deviations[index] for index in chosen}
        table = TensorTable(
            [in_order[index] for index in chosen], groups=[0] * count, adaptive=[False] * count
        )
        moved = {
            key: upload(deviation.to(table.sum_dtype).contiguous(), device)
            for key, deviation in distinct.items()
        }
        add_noise(
            table,
            [moved[id(deviations[index])] for index in chosen],
            upload(torch.tensor([seed, position], device="cpu"), device),
            streams=chosen,
        )
    for tensor, written in zip(tensors, in_order, strict=True):
        if written is not tensor:
            tensor.copy_(written)
