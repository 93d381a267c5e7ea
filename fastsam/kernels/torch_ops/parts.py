"""Parts of a table: rows that one list of PyTorch operations processes together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from fastsam.kernels.table import TensorTable

_ELEMENTS = 1 << 20
"""Maximum number of elements in a part with several tensors, which bounds temporary memory."""


@dataclass(frozen=True)
class Part:
    """Rows of one group that have a gradient, equal flags and the same state slots.

    Attributes:
        rows: indices in the table.
        group: row of the block of hyperparameters.
        adaptive: whether ASAM's normalization applies.
        stochastic: whether the ascent is rounded stochastically.
        weights: the tensors to write.
        backups: the weights before the ascent; for weights that were not perturbed, the weights.
        gradients: gradient of each weight.
        states: the base optimizer's tensors by slot; an empty list for a slot that the rows do not use.
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
    """Yield parts that together contain every row with a gradient."""
    members: dict[tuple[object, ...], list[int]] = {}
    for row in compress(range(table.count), (g is not None for g in table.gradients)):
        key = (
            table.groups[row],
            table.adaptive[row],
            table.stochastic[row],
            *(state[row] is None for state in table.states),
        )
        members.setdefault(key, []).append(row)
    for rows in (run for all_rows in members.values() for run in _runs(table, all_rows)):
        first = rows[0]
        yield Part(
            rows=rows,
            group=table.groups[first],
            adaptive=table.adaptive[first],
            stochastic=table.stochastic[first],
            weights=[table.weights[row] for row in rows],
            backups=[backup_of(table, row) for row in rows],
            gradients=present(table.gradients, rows),
            states=tuple(present(state, rows) for state in table.states),
        )


def _runs(table: TensorTable, rows: Sequence[int]) -> Iterator[list[int]]:
    """Split rows into runs of a bounded number of elements, so that temporary memory is small and reused."""
    run: list[int] = []
    elements = 0
    for row in rows:
        size = table.weights[row].numel()
        if run and elements + size > _ELEMENTS:
            yield run
            run, elements = [], 0
        run.append(row)
        elements += size
    yield run


def backup_of(table: TensorTable, row: int) -> Tensor:
    """Return the backup of a weight; a weight that was not perturbed is its own backup."""
    return table.backups[row] if table.backed_up[row] else table.weights[row]


def present(tensors: Sequence[Tensor | None], rows: Sequence[int]) -> list[Tensor]:
    """Return the tensors of ``rows`` that are not None."""
    chosen = (tensors[row] for row in rows)
    return [tensor for tensor in chosen if tensor is not None]


def arithmetic(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors in their arithmetic dtype: 16-bit ones as float32, others unchanged."""
    return [tensor.float() if tensor.dtype.itemsize == 2 else tensor for tensor in tensors]


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the arithmetic dtype: float64 for float64, and float32 for all other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_scalar(tensors: Sequence[Tensor], scalar: Tensor) -> None:
    """Add a scalar on the device to each tensor, in place.

    The scalar is passed as a list, because ``_foreach_add_`` with one tensor reads it on the host on devices
    without a fast path.
    """
    torch._foreach_add_(list(tensors), [scalar] * len(tensors))


def add_product(sums: Sequence[Tensor], tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Add ``factor * tensor`` to each of ``sums``, in place; ``factor`` is a scalar on the device."""
    torch._foreach_addcmul_(list(sums), list(tensors), [factor] * len(tensors))


def plus_product(
    terms: Sequence[Tensor], tensors: Sequence[Tensor], factor: Tensor
) -> list[Tensor]:
    """Return ``term + factor * tensor`` as new tensors; ``factor`` is a scalar on the device."""
    return list(torch._foreach_addcmul(list(terms), list(tensors), [factor] * len(tensors)))
