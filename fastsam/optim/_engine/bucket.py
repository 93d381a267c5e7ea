"""Buckets: parameters that share a device and a dtype, with the memory that their kernels need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import compress
from operator import is_, itemgetter, or_
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastsam.distributed import is_sharded, local_part
from fastsam.kernels import sam as kernels
from fastsam.kernels.table import TensorTable, is_dense
from fastsam.optim._engine import sharding
from fastsam.optim._engine.backup import backup_memory, exchange_bits
from fastsam.optim._engine.fused import FusedRule, needs_conversion, new_state

_SLOTS: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)

_NO_STATE: dict[str, Any] = {}


class Member(NamedTuple):
    """A parameter with the index of its group and the group's settings for it."""

    parameter: Tensor
    group: int
    adaptive: bool
    stochastic: bool
    perturb: bool


class _Bound(NamedTuple):
    """State tensors of one parameter whose addresses are in the table; a step counter comes last."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    addresses: list[int]

    def are_in(self, entry: Mapping[str, Any]) -> bool:
        """Return whether ``entry`` still holds the same tensor objects."""
        return all(map(is_, map(entry.get, self.names), self.tensors))


_NOTHING_BOUND = _Bound((), (), [])


class Bucket:
    """Parameters of one device, dtype and sharding, processed by one launch per phase.

    The ascent perturbs all parameters of a bucket or none.

    Args:
        members: the parameters, in the order of the optimizer's groups.
        slot: index of this bucket's squared norm.

    Attributes:
        perturbs: whether the ascent perturbs these parameters.
        backup: the weights before the ascent, one flat tensor: 4 bytes per float32 parameter, the only
            memory that SAM adds. None before the first ascent, and if ``perturbs`` is False: the kernels
            then read an unperturbed weight as its own backup.
        perturbed: for each parameter, whether the current ascent moved it.
        rounds_to_nearest: whether the ascent of any parameter is rounded to nearest.
    """

    def __init__(self, members: Sequence[Member], *, slot: int) -> None:
        self.parameters = [member.parameter for member in members]
        self.groups = [member.group for member in members]
        self.slot = slot
        self.perturbs = members[0].perturb
        self.rounds_to_nearest = not all(member.stochastic for member in members)
        self.shard_groups = sharding.shard_groups(self.parameters[0])
        self._sharded = any(map(is_sharded, self.parameters))
        self._gathering = sharding.gathering_modules(self.parameters) if self._sharded else []
        weights = [local_part(parameter) for parameter in self.parameters]
        self.device = weights[0].device
        self.dtype = weights[0].dtype
        # Kernels treat memory as flat, so a weight with gaps in its memory is processed in a dense copy.
        self._staged = [
            (weight, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))
            for weight in weights
            if not is_dense(weight)
        ]
        stand_in = {id(weight): copy for weight, copy in self._staged}
        self.weights = [stand_in.get(id(weight), weight) for weight in weights]
        self.table = TensorTable(
            self.weights,
            groups=self.groups,
            adaptive=[member.adaptive for member in members],
            stochastic=[member.stochastic for member in members],
        )
        self._addresses = self._addresses_of(self.parameters)
        self.scratch = self.table.scratch()
        self.backup: Tensor | None = None
        self._backups: list[Tensor] = []
        self.perturbed = [False] * len(self.parameters)
        self._bound = [_NOTHING_BOUND] * len(self.parameters)
        self._bound_columns: dict[str, tuple[Tensor, ...]] = {}
        self._bound_tensors: list[Tensor] = []
        self._bound_addresses: list[int] = []
        self._values: list[Mapping[str, Any]] = []
        self._entries: list[Mapping[str, Any]] = []
        self._counts_steps = False
        self._counters = torch.zeros(len(self.parameters), dtype=torch.float32, device=self.device)
        self._counter_views = list(self._counters.unbind())

    @property
    def is_16_bit(self) -> bool:
        """Whether the weights have 16 bits, so that rounding may remove a small perturbation."""
        return self.dtype.itemsize == 2

    def elements(self, gradients: Sequence[Tensor | None]) -> int:
        """Return the number of elements in ``gradients``."""
        return sum(gradient.numel() for gradient in gradients if gradient is not None)

    def state_addresses(self) -> list[int]:
        """Return the addresses of the base optimizer's state in the table."""
        return [address for slot in _SLOTS for address in self.table.column(f"state{slot}")]

    def moved(self) -> bool:
        """Return whether a parameter's storage was replaced since the bucket was created."""
        return self._addresses != self._addresses_of(self.parameters)

    def _addresses_of(self, tensors: Iterable[Tensor]) -> list[int]:
        """Return the addresses of the local parts of parameters or their state."""
        if self._sharded:
            tensors = map(local_part, tensors)
        return list(map(Tensor.data_ptr, tensors))

    def take_gradients(self) -> list[Tensor | None]:
        """Read ``p.grad`` of every parameter into the table and return the gradients."""
        if self._sharded:
            gradients = [sharding.local_gradient(p) for p in self.parameters]
        else:
            gradients = [p.grad for p in self.parameters]
        self.table.set_gradients(gradients)
        return gradients

    def attach(self, scalars: kernels.Scalars, *, counts_skips: bool) -> None:
        """Set the scalars that the phases share. Exactly one bucket per device counts skipped steps."""
        self._scalars = scalars
        self._counts_skips = counts_skips
        self._squared_norm = scalars.squared_norms[self.slot : self.slot + 1]
        self._ascent = self._ascent_scalars(None)
        self._descent = self._descent_scalars(None)

    def _ascent_scalars(self, grad_scale: Tensor | None) -> Any:
        return self._scalars.arguments(count_unchanged=self.is_16_bit, grad_scale=grad_scale)

    def _descent_scalars(self, grad_scale: Tensor | None) -> Any:
        return self._scalars.arguments(count_skip=self._counts_skips, grad_scale=grad_scale)

    def make_backup(self) -> None:
        """Allocate the backup if the ascent needs one and it does not exist."""
        if self.perturbs and self.backup is None:
            self.backup, self._backups = backup_memory(self.weights)

    def norm(self) -> None:
        """Write this bucket's squared norm, summed over the ranks that share its parameters."""
        self._load_staged()
        kernels.norm(self.table, self._scalars.hyper, self._squared_norm, self.scratch)
        sharding.all_reduce_sum(self._squared_norm, self.shard_groups)

    def perturb(
        self, gradients: Sequence[Tensor | None], *, grad_scale: Tensor | None = None
    ) -> None:
        """Back up and perturb the parameters that have a gradient."""
        self.make_backup()
        self.table.set_backups(self._backups)
        scalars = self._ascent if grad_scale is None else self._ascent_scalars(grad_scale)
        kernels.perturb(self.table, scalars)
        self.perturbed = [gradient is not None for gradient in gradients]
        self.table.release_gradients()
        self._written(self.perturbed)

    def restore(self) -> None:
        """Restore the perturbed parameters bit for bit, even if their storage was replaced."""
        self.table.release_gradients()
        if not any(self.perturbed):
            return
        if self.moved():
            for parameter, backup, perturbed in zip(
                self.parameters, self._backups, self.perturbed, strict=True
            ):
                if perturbed:
                    local_part(parameter).copy_(backup)
            sharding.drop_gathered(self._gathering)
        else:
            if not all(self.perturbed):
                self._load_staged()
            self._set_backups_for_update()
            kernels.restore(self.table)
            self._written(self.perturbed)
        self.perturbed = [False] * len(self.parameters)

    def exchange(self) -> None:
        """Swap the perturbed weights and their backups in place, bit for bit."""
        for parameter, backup in self.backups():
            exchange_bits(local_part(parameter), backup)
        sharding.drop_gathered(self._gathering)

    def forget_backups(self) -> None:
        """Keep the current weights as the restored ones, and drop the perturbation."""
        self.perturbed = [False] * len(self.parameters)

    def backups(self) -> list[tuple[Tensor, Tensor]]:
        """Return each perturbed parameter with the backup of its local part, not copied."""
        if not any(self.perturbed):
            return []
        return list(compress(zip(self.parameters, self._backups, strict=True), self.perturbed))

    def update(
        self,
        gradients: Sequence[Tensor | None],
        rule: FusedRule,
        *,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Restore all perturbed parameters and update all parameters that have a gradient."""
        if not all(self.perturbed):
            self._load_staged()
        self._set_backups_for_update()
        scalars = self._descent if grad_scale is None else self._descent_scalars(grad_scale)
        kernels.update(self.table, scalars, self.scratch, rule=rule.name)
        self.table.release_gradients()
        written = [gradient is not None for gradient in gradients]
        if any(self.perturbed):
            written = list(map(or_, self.perturbed, written))
        self._written(written)
        sharding.increment_versions(self._bound_tensors)
        self.perturbed = [False] * len(self.parameters)

    def bind_state(
        self,
        gradients: Sequence[Tensor | None],
        rule: FusedRule,
        param_groups: Sequence[Mapping[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        """Write the addresses of the base optimizer's state to the table, and create missing state.

        The state is looked up in every step, because users replace, clear, load and offload it. An assignment
        to ``.data`` replaces the memory of a tensor but not the tensor object, so addresses are compared too.
        """
        names = [
            (*rule.state_keys(group), rule.step_key) if rule.step_key else rule.state_keys(group)
            for group in param_groups
        ]
        if self._is_bound(names, state):
            return
        bound = None
        for i, (parameter, gradient, group, old) in enumerate(
            zip(self.parameters, gradients, self.groups, self._bound, strict=True)
        ):
            wanted = names[group]
            if gradient is None or (old.names == wanted == ()):
                continue
            entry = state[parameter]
            if old.names == wanted and self._still_holds(old, entry):
                continue
            if bound is None:
                bound = list(self._bound)
            bound[i] = self._bind_parameter(i, entry, rule, param_groups[group], wanted)
        if bound is not None:
            self._write_state_columns(bound, rule, param_groups)
            self._bound = bound
            self._bound_tensors = [tensor for each in bound for tensor in each.tensors]
            self._bound_addresses = [address for each in bound for address in each.addresses]
            self._bound_columns = {}
            if bound[0].names and all(each.names == bound[0].names for each in bound):
                columns = zip(*(each.tensors for each in bound), strict=True)
                self._bound_columns = dict(zip(bound[0].names, columns, strict=True))

    def _is_bound(
        self, names: Sequence[tuple[str, ...]], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> bool:
        """Return whether all parameters have state of the same names and it is bound: a fast path.

        False only means that the caller must look at each parameter.
        """
        wanted = tuple(self._bound_columns)
        if not wanted or any(names[group] != wanted for group in set(self.groups)):
            return False
        if self._bound_addresses != self._addresses_of(self._bound_tensors):
            return False
        # Hashing tensors is slow, so look them up only after an entry was added, removed or replaced.
        values = list(state.values())
        if len(values) == len(self._values) and all(map(is_, values, self._values)):
            entries = self._entries
        else:
            entries = [state.get(parameter, _NO_STATE) for parameter in self.parameters]
            self._values, self._entries = values, entries
        try:
            return all(
                all(map(is_, map(itemgetter(name), entries), tensors))
                for name, tensors in self._bound_columns.items()
            )
        except KeyError:  # an entry lacks a tensor
            return False

    def _bind_parameter(
        self,
        i: int,
        entry: dict[str, Any],
        rule: FusedRule,
        group: Mapping[str, Any],
        names: tuple[str, ...],
    ) -> _Bound:
        weight = self.weights[i]
        started = all(entry.get(name) is not None for name in names)
        for name, fresh in new_state(rule, group, weight).items():
            value = entry.get(name)
            if name == rule.step_key:
                # Adam's counter may be on another device, or a plain number in old checkpoints.
                if not isinstance(value, Tensor):
                    value = fresh if value is None else torch.tensor(value, device="cpu")
                entry[name] = value.to(device=self.device, dtype=torch.float32)
            elif value is None:
                entry[name] = self._like_parameter(i, fresh)
            elif needs_conversion(local_part(value), weight):  # after model.double(), for example
                entry[name] = self._like_parameter(i, fresh.copy_(local_part(value)))
        self._counter_views[i].fill_(float(started))  # an assignment would wait for a GPU
        tensors = tuple(entry[name] for name in names)
        return _Bound(names, tensors, self._addresses_of(tensors))

    def _like_parameter(self, i: int, tensor: Tensor) -> Tensor:
        """Return a state tensor as torch's optimizers create it: a DTensor for a DTensor parameter."""
        parameter = self.parameters[i]
        return sharding.wrap_like(parameter, tensor) if is_sharded(parameter) else tensor

    def _write_state_columns(
        self, bound: Sequence[_Bound], rule: FusedRule, param_groups: Sequence[Mapping[str, Any]]
    ) -> None:
        for slot in _SLOTS:
            self.table.set_state(
                slot,
                [
                    local_part(b.tensors[slot])
                    if slot < len(b.names) and b.names[slot] != rule.step_key
                    else None
                    for b in bound
                ],
            )
        self._counts_steps = rule.step_key is None and any(
            rule.counts_steps(param_groups[group]) for group in self.groups
        )
        if rule.step_key is not None:
            self.table.set_steps(
                [
                    b.tensors[-1] if b.tensors else view
                    for view, b in zip(self._counter_views, bound, strict=True)
                ]
            )
        else:
            self.table.set_steps(self._counter_views if self._counts_steps else None)

    def unstarted(
        self, state: Mapping[Tensor, Mapping[str, Any]]
    ) -> list[tuple[Tensor, tuple[str, ...]]]:
        """Return the parameters that have not been updated yet, with the names of their state tensors.

        State that was replaced since, for instance by a checkpoint, has been updated.
        """
        if not self._counts_steps:
            return []
        return [
            (parameter, bound.names)
            for parameter, bound, count in zip(
                self.parameters, self._bound, self._counters.tolist(), strict=True
            )
            if bound.names and count == 0 and self._still_holds(bound, state.get(parameter))
        ]

    def _still_holds(self, bound: _Bound, entry: Mapping[str, Any] | None) -> bool:
        """Return whether ``entry`` has the bound tensors, in the same memory."""
        return (
            entry is not None
            and bound.are_in(entry)
            and bound.addresses == self._addresses_of(bound.tensors)
        )

    def _set_backups_for_update(self) -> None:
        if any(self.perturbed):
            self.table.set_backups(self._backups, self.perturbed)
        else:  # a step without an ascent, for which no backup may exist
            self.table.set_backups(self.weights, self.perturbed)

    def _load_staged(self) -> None:
        for weight, copy in self._staged:
            copy.copy_(weight)

    def _written(self, which: Sequence[bool]) -> None:
        for weight, copy in self._staged:
            weight.copy_(copy)
        written = self.parameters if all(which) else list(compress(self.parameters, which))
        sharding.increment_versions(written)
        sharding.drop_gathered(self._gathering)
