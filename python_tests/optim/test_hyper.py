"""The block of settings follows numbers and device tensors that replace each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels import extension
from fastsam.kernels.sam import Scalars
from fastsam.optim._engine.hyper import HyperRows

RHO = extension.HYPER_COLUMNS.index("rho")


class Block:
    """Stands in for the scalars of a device; a setting from a device tensor is that tensor."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.uploads = 0

    def write_hyper(self, rows: Sequence[Sequence[float]]) -> None:
        self.rows = [list(row) for row in rows]
        self.uploads += 1

    def write_setting(self, group: int, column: int, value: Tensor) -> None:
        self.rows[group][column] = value


def test_a_number_replaces_a_device_tensor() -> None:
    """Also 0.0, which is what the row of a device tensor holds in its place."""
    block, writer = Block(), HyperRows()
    on_device = torch.tensor(0.3, device="meta")
    groups: list[dict[str, Any]] = [
        {"rho": value, "eta": 0.0, "adaptive": False} for value in (on_device, 0.1)
    ]
    for values in [(on_device, 0.1), (0.0, 0.1), (0.0, on_device), (on_device, 0.0), (0.2, 0.0)]:
        for group, value in zip(groups, values, strict=True):
            group["rho"] = value
        for _ in range(2):
            writer.write(groups, None, {torch.device("cpu"): block})  # type: ignore[dict-item]
            for row, value in zip(block.rows, values, strict=True):
                assert row[RHO] is value or row[RHO] == value
    assert block.uploads == 5  # none for settings that stay the same


def test_a_setting_may_be_a_tensor_of_shape_1() -> None:
    """As torch.optim accepts lr=torch.tensor([0.1])."""
    scalars = Scalars.zeros(
        groups=2,
        tables=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
        skipped_steps=torch.zeros(1),
    )
    scalars.write_setting(1, 0, torch.tensor([0.25]))
    assert scalars.hyper[1, 0] == 0.25
    assert scalars.hyper.count_nonzero() == 1
    assert scalars.complements is not None
    assert scalars.complements[1, 0] == 0.75
