"""The rows of a table that one list of PyTorch operations works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from fastsam.kernels.table import TensorTable


@dataclass(frozen=True)
class Part:
    """Rows with a gradient, of one group, with the same flags and the same kinds of state.

    Attributes:
        rows: places in the table.
        group: row of the block of hyper-parameters.
        adaptive: whether ASAM's normalization applies.
        stochastic: whether the ascent is rounded stochastically.
        weights: the tensors to write.
        backups: the weights before the ascent; the weights themselves where there was none.
        gradients: one for each weight.
        states: the base optimizer's tensors by slot; empty where the rows have none.
    """

    rows: list[int]
    group: int
    adaptive: bool
    stochastic: bool
    weights: list[Tensor]
    backups: list[Tensor]
    gradients: list[Tensor]
    states: tuple[list[Tensor], ...]


def parts_of(table: TensorTable) -> Iterator[Part]:
    """Yield the rows that have a gradient, part by part."""
    members: dict[tuple[object, ...], list[int]] = {}
    for row in compress(range(table.count), (g is not None for g in table.gradients)):
        key = (
            table.groups[row],
            table.adaptive[row],
            table.stochastic[row],
            *(state[row] is None for state in table.states),
        )
        members.setdefault(key, []).append(row)
    for rows in members.values():
        first = rows[0]
        yield Part(
            rows=rows,
            group=table.groups[first],
            adaptive=table.adaptive[first],
            stochastic=table.stochastic[first],
            weights=[table.weights[row].detach() for row in rows],
            backups=[backup_of(table, row) for row in rows],
            gradients=present(table.gradients, rows),
            states=tuple(present(state, rows) for state in table.states),
        )


def backup_of(table: TensorTable, row: int) -> Tensor:
    """Return the backup of a weight; a weight that was not perturbed is its own."""
    return (table.backups[row] if table.backed_up[row] else table.weights[row]).detach()


def present(tensors: Sequence[Tensor | None], rows: Sequence[int]) -> list[Tensor]:
    """Return the tensors of ``rows`` that are there."""
    chosen = (tensors[row] for row in rows)
    return [tensor.detach() for tensor in chosen if tensor is not None]


def arithmetic(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in the dtype of arithmetic: float32 for 16 bits, else their own, without a copy."""
    return [tensor.float() if tensor.dtype.itemsize == 2 else tensor for tensor in tensors]


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for the other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_scalar(tensors: Sequence[Tensor], scalar: Tensor) -> None:
    """Add a scalar on the device to each tensor, in place.

    ``_foreach_add_`` with one tensor instead of a list reads it on the host where it has no fast path.
    """
    torch._foreach_add_(list(tensors), [scalar] * len(tensors))
