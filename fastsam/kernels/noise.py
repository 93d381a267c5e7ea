"""Counter-based normal noise: a function of seed, step, stream and element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.kernels import extension
from fastsam.kernels.table import TensorTable
from fastsam.kernels.torch_ops import noise as torch_noise


def add_noise(
    table: TensorTable, scales: Sequence[Tensor], seed_and_step: Tensor, *, streams: Sequence[int]
) -> None:
    """Add noise to all weights of a table in one launch: ``w += scale * z`` with z standard normal.

    z depends only on seed, step, stream and the offset of the element in memory. It is bitwise equal for any
    number of threads and equal up to rounding on CPU and CUDA. A captured graph that advances the step adds
    new noise in every replay.

    Args:
        table: the weights.
        scales: standard deviations, float64 ``[rows]`` per weight on its device; see
            :meth:`fastsam.kernels.table.TensorTable.set_noise`.
        seed_and_step: int64 ``[2]`` on the table's device, read when the launch runs.
        streams: index in [0, 2^32) of each weight's stream; weights with the same stream get the same z.

    Raises:
        ValueError: ``scales`` or ``seed_and_step`` has a wrong shape, dtype or device; nothing was changed.

    Example:
        >>> import torch
        >>> from fastsam.kernels.noise import add_noise
        >>> from fastsam.kernels.table import TensorTable
        >>> weight = torch.zeros(4)
        >>> table = TensorTable([weight], groups=[0], adaptive=[False])
        >>> deviation = torch.full((1,), 0.1, dtype=torch.float64)
        >>> add_noise(table, [deviation], torch.tensor([7, 0]), streams=[0])
        >>> bool((weight != 0).all())
        True
    """
    if seed_and_step.dtype != torch.int64 or seed_and_step.shape != (2,):
        raise ValueError(
            f"seed_and_step must be int64 [2], got {seed_and_step.dtype} {tuple(seed_and_step.shape)}"
        )
    if seed_and_step.device != table.device:
        raise ValueError(
            f"seed_and_step must be on {table.device} like the table, got {seed_and_step.device}"
        )
    table.set_noise(scales, streams)
    if table.backend == "torch":
        torch_noise.add_noise(table, seed_and_step)
        return
    extension.backend(table.device).add_noise(
        extension.execution(table.device),
        extension.DTYPE_CODES[table.dtype],
        table.cells,
        seed_and_step.data_ptr(),
    )
    torch.autograd.graph.increment_version(table.weights)
