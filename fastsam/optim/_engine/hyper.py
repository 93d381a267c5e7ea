"""The settings of all parameter groups as a block of float64 scalars that the kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels import extension
from fastsam.kernels import sam as kernels
from fastsam.optim._engine.fused import FusedRule
from fastsam.optim._engine.outer import Groups
from fastsam.optim._engine.settings import check_rho, eta_of

_NUMBERS = frozenset({float, int, bool})
_RHO = extension.HYPER_COLUMNS.index("rho")


class HyperRows:
    """Writes the settings to every device's block, where one has changed since the last call."""

    def __init__(self) -> None:
        self._rows: list[list[float]] = []
        self._options: list[dict[str, Any]] = []

    def write(
        self,
        groups: Groups,
        rule: FusedRule | None,
        scalars: Mapping[torch.device, kernels.Scalars],
    ) -> None:
        """Refresh the blocks.

        Args:
            groups: the parameter groups, one row of the block each.
            rule: the base optimizer's fused rule, whose settings are written too.
            scalars: every device's scalars, which hold the block.

        Raises:
            ValueError: a rho is negative or not finite. No block was changed.
        """
        options = [
            {"rho": group["rho"], "eta": eta_of(group), **(rule.hyper(group) if rule else {})}
            for group in groups
        ]
        # Other types, tensors above all, may change their value and stay the same object.
        fixed = all(type(value) in _NUMBERS for row in options for value in row.values())
        if fixed and options == self._options:
            return
        rows: list[list[float]] = []
        on_device: list[tuple[int, int, Tensor]] = []
        for index, values in enumerate(options):
            check_rho(values["rho"])
            row = [0.0] * len(extension.HYPER_COLUMNS)
            for name, value in values.items():
                column = extension.HYPER_COLUMNS.index(name)
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    on_device.append((index, column, value))
                else:
                    row[column] = float(value)
            rows.append(row)
        for held in scalars.values():
            if rows != self._rows:
                held.write_hyper(rows)
            for index, column, value in on_device:
                held.write_setting(index, column, value)
        self._rows = rows
        self._options = options if fixed else []

    def any_rho(self) -> bool:
        """Return whether a group has a rho other than 0; one on a device counts as 0."""
        return any(row[_RHO] != 0.0 for row in self._rows)


def need_not_wait(device: torch.device) -> bool:
    """Return whether a copy to ``device`` may be asynchronous.

    Streams order what the kernels of a GPU read; those of the CPU run at once, after the copy. Other devices
    do not all order a copy from memory that its owner may free.
    """
    return device.type == "cuda"
