"""Normal noise that depends on a seed, a step and a place, and on nothing else."""

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
    """``w += scale * z`` for all weights of a table, with z standard normal, in one launch.

    z of an element is a function of seed, step, stream and the element's place in memory alone: the
    same bits on any number of threads, the same numbers to rounding on CPU and CUDA, and anew in every
    replay of a captured graph that advances the step.

    Args:
        table: the weights.
        scales: standard deviations, float64 ``[rows]`` per weight on its device; see
            :meth:`fastsam.kernels.table.TensorTable.set_noise`.
        seed_and_step: int64 ``[2]`` on the table's device, read when the launch runs.
        streams: number in [0, 2^32) of each weight's stream; weights of one stream draw the same numbers.

    Raises:
        ValueError: scales or seed_and_step do not fit; nothing was changed.

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
        raise ValueError(f"seed_and_step is on {seed_and_step.device}, the table on {table.device}")
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
