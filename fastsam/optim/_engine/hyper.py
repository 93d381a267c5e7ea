"""The settings of all parameter groups as a block of scalars that the kernels read."""

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
    """Writes the settings to every device's block if any has changed since the last call."""

    def __init__(self) -> None:
        self._rows: list[list[float]] = []
        self._on_device: list[tuple[int, int]] = []
        self._options: list[dict[str, Any]] = []

    def write(
        self,
        groups: Groups,
        rule: FusedRule | None,
        scalars: Mapping[torch.device, kernels.Scalars],
    ) -> None:
        """Refresh the blocks.

        Args:
            groups: the parameter groups; each has one row of the block.
            rule: the base optimizer's fused rule, whose settings are included; None without one.
            scalars: the scalars of every device, which include its block.

        Raises:
            ValueError: a rho is negative or not finite. No block was changed.
        """
        options = [
            {"rho": group["rho"], "eta": eta_of(group), **(rule.hyper(group) if rule else {})}
            for group in groups
        ]
        # Tensors and other mutable values may change without becoming another object: always write them.
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
        # Rows have 0.0 where the setting is a tensor on a device; a number there may be 0.0, too.
        cells = [(index, column) for index, column, _ in on_device]
        for held in scalars.values():
            if rows != self._rows or cells != self._on_device:
                held.write_hyper(rows)
            for index, column, value in on_device:
                held.write_setting(index, column, value)
        self._rows = rows
        self._on_device = cells
        self._options = options if fixed else []

    def any_rho(self) -> bool:
        """Return whether a group has a nonzero rho, among those that are not device tensors."""
        return any(row[_RHO] != 0.0 for row in self._rows)
