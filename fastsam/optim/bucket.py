"""The parameters of one optimizer that share a device and a dtype, with the memory their kernels need."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels import sam as kernels
from fastsam.optim import sharding
from fastsam.optim.fused import FusedRule, new_state

_BACKUP_ALIGNMENT = 16  # bytes: what the widest vector access of the CUDA kernels needs


class Bucket:
    """Parameters of one device, dtype and sharding, served by one launch per phase.

    Args:
        parameters: the parameters, in the order of the optimizer's groups.
        groups: index of each parameter's group.
        adaptive: whether ASAM's normalisation applies to each parameter.
        slot: this bucket's place among the squared norms.

    Attributes:
        backup: the weights before the ascent, one flat tensor; 4 bytes per float32 parameter and the only
            memory that SAM adds.
        perturbed: which parameters the current ascent moved.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        groups: Sequence[int],
        adaptive: Sequence[bool],
        slot: int,
    ) -> None:
        self.parameters = list(parameters)
        self.groups = list(groups)
        self.slot = slot
        self.shard_groups = sharding.shard_groups(parameters[0])
        self._sharded = sharding.is_sharded(parameters[0])
        weights = [sharding.local(parameter) for parameter in parameters]
        self.device = weights[0].device
        self.dtype = weights[0].dtype
        # Kernels see memory as flat; weights with gaps are worked on in a dense copy.
        self._staged = [
            (weight, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))
            for weight in weights
            if not kernels.is_dense(weight)
        ]
        stand_in = {id(weight): copy for weight, copy in self._staged}
        self.weights = [stand_in.get(id(weight), weight) for weight in weights]
        self.table = kernels.TensorTable(self.weights, groups=groups, adaptive=adaptive)
        self._addresses = [parameter.data_ptr() for parameter in weights]
        self.scratch = self.table.scratch()
        self.backup, self._backup_addresses = _backup_memory(self.weights)
        self.perturbed = [False] * len(self.parameters)
        self._bound_state: list[dict[str, Any] | None] = [None] * len(self.parameters)
        self._bound_tensors: list[tuple[Tensor, ...]] = [()] * len(self.parameters)
        self._counters = torch.zeros(len(self.parameters), dtype=torch.float32, device=self.device)
        self._counter_views = list(self._counters.unbind())

    def moved(self) -> bool:
        """Whether a parameter's storage was replaced since the bucket was made."""
        return self._addresses != [sharding.local(p).data_ptr() for p in self.parameters]

    def take_gradients(self) -> list[Tensor | None]:
        """Reads ``p.grad`` of every parameter into the table and returns what it read."""
        if self._sharded:
            gradients = [sharding.local_gradient(p) for p in self.parameters]
        else:
            gradients = [p.grad for p in self.parameters]
        self.table.set_gradients(gradients)
        return gradients

    def norm(self, scalars: kernels.Scalars) -> None:
        """Writes this bucket's part of the squared norm, summed over the ranks that share it."""
        self._load_staged()
        part = scalars.squared_norms[self.slot : self.slot + 1]
        kernels.norm(self.table, scalars.hyper, part, self.scratch)
        sharding.reduce_sum(part, self.shard_groups)

    def perturb(self, gradients: Sequence[Tensor | None], scalars: Any) -> None:
        """Moves the parameters that have a gradient, keeping where they were."""
        self.perturbed = [gradient is not None for gradient in gradients]
        self.table.set_backups(self._backup_addresses)
        kernels.perturb(self.table, scalars)
        self._written(self.perturbed)

    def restore(self) -> None:
        """Puts the perturbed parameters back, bit for bit, wherever their storage is now."""
        if self.moved():
            for parameter, backup, perturbed in zip(
                self.parameters, self._backup_views(), self.perturbed, strict=True
            ):
                if perturbed:
                    sharding.local(parameter).copy_(backup)
        else:
            if not all(self.perturbed):
                self._load_staged()
            self._set_backups_for_update()
            kernels.restore(self.table)
            self._written(self.perturbed)
        self.perturbed = [False] * len(self.parameters)

    def update(self, gradients: Sequence[Tensor | None], scalars: Any, rule: FusedRule) -> None:
        """Restores every perturbed parameter and updates every one that has a gradient."""
        if not all(self.perturbed):
            self._load_staged()
        self._set_backups_for_update()
        kernels.update(self.table, scalars, self.scratch, rule=rule.name)
        updated = [gradient is not None for gradient in gradients]
        self._written([a or b for a, b in zip(self.perturbed, updated, strict=True)])
        sharding.increment_versions(
            [tensor for tensors in self._bound_tensors for tensor in tensors]
        )
        self.perturbed = [False] * len(self.parameters)

    def bind_state(
        self,
        gradients: Sequence[Tensor | None],
        rule: FusedRule,
        param_groups: Sequence[Mapping[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        """Points the table at the base optimizer's state, creating what a first update needs.

        ``state`` is looked up in every step, because users replace, clear and load it.
        """
        changed = False
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                continue
            entry = state[parameter]
            group = param_groups[self.groups[i]]
            keys = rule.state_keys(group)
            bound = self._bound_tensors[i]
            if entry is self._bound_state[i] and all(
                entry.get(key) is tensor for key, tensor in zip(keys, bound, strict=False)
            ):
                continue
            self._bind_parameter(i, entry, rule, group)
            changed = True
        if changed:
            self._write_state_columns(rule, param_groups)

    def _bind_parameter(
        self, i: int, entry: dict[str, Any], rule: FusedRule, group: Mapping[str, Any]
    ) -> None:
        weight = self.weights[i]
        keys = rule.state_keys(group)
        started = all(entry.get(key) is not None for key in keys)
        for key, fresh in new_state(rule, group, weight).items():
            value = entry.get(key)
            if value is None:
                entry[key] = self._like_parameter(i, fresh) if key in keys else fresh
            elif key == rule.step_key and (
                value.device != self.device or value.dtype != torch.float32
            ):
                entry[key] = value.to(device=self.device, dtype=torch.float32)
            elif key in keys and sharding.local(value).stride() != weight.stride():
                copy = torch.empty_like(weight, memory_format=torch.preserve_format)
                entry[key] = self._like_parameter(i, copy.copy_(sharding.local(value)))
        self._counters[i] = 1.0 if keys and started else 0.0
        self._bound_state[i] = entry
        self._bound_tensors[i] = tuple(entry[key] for key in keys)

    def _like_parameter(self, i: int, tensor: Tensor) -> Tensor:
        """State of a DTensor parameter is a DTensor too, as torch's optimizers make it."""
        return sharding.wrap_like(self.parameters[i], tensor) if self._sharded else tensor

    def _write_state_columns(
        self, rule: FusedRule, param_groups: Sequence[Mapping[str, Any]]
    ) -> None:
        slots: tuple[list[Tensor | None], ...] = ([], [], [])
        for tensors in self._bound_tensors:
            for slot, column in enumerate(slots):
                column.append(sharding.local(tensors[slot]) if slot < len(tensors) else None)
        for slot, column in enumerate(slots):
            self.table.set_state(slot, column)  # type: ignore[arg-type]
        if rule.step_key is not None:
            key = rule.step_key
            self.table.set_steps(
                [
                    view if entry is None else entry[key]
                    for view, entry in zip(self._counter_views, self._bound_state, strict=True)
                ]
            )
        elif any(rule.counts_steps(param_groups[group]) for group in self.groups):
            self.table.set_steps(self._counter_views)
        else:
            self.table.set_steps(None)

    def unstarted(self) -> list[Tensor]:
        """Parameters whose state tensors exist but hold nothing yet: every update so far was skipped."""
        counts = self._counters.tolist()
        return [
            parameter
            for parameter, entry, count in zip(
                self.parameters, self._bound_state, counts, strict=True
            )
            if entry is not None and count == 0
        ]

    def _set_backups_for_update(self) -> None:
        if all(self.perturbed):
            self.table.set_backups(self._backup_addresses)
            return
        own = self.table.column("weight")
        self.table.set_backups(
            [
                backup if perturbed else weight
                for backup, weight, perturbed in zip(
                    self._backup_addresses, own, self.perturbed, strict=True
                )
            ]
        )

    def _backup_views(self) -> list[Tensor]:
        views = []
        for weight, address in zip(self.weights, self._backup_addresses, strict=True):
            offset = (address - self.backup.data_ptr()) // self.backup.element_size()
            views.append(self.backup.as_strided(weight.shape, weight.stride(), offset))
        return views

    def _load_staged(self) -> None:
        for weight, copy in self._staged:
            copy.copy_(weight)

    def _written(self, which: Sequence[bool]) -> None:
        for weight, copy in self._staged:
            weight.copy_(copy)
        sharding.increment_versions(
            [p for p, written in zip(self.parameters, which, strict=True) if written]
        )


def _backup_memory(weights: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """One flat tensor that holds all ``weights``, and the aligned address of each in it."""
    element = weights[0].element_size()
    per_line = _BACKUP_ALIGNMENT // element
    offsets = []
    total = 0
    for weight in weights:
        offsets.append(total)
        total += -(-weight.numel() // per_line) * per_line
    backup = torch.empty(max(total, 1), dtype=weights[0].dtype, device=weights[0].device)
    return backup, [backup.data_ptr() + offset * element for offset in offsets]
