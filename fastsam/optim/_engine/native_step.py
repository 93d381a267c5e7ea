"""The two halves of a SAM step on the native kernels, for parameters of all devices and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from fastsam.kernels import sam as kernels
from fastsam.kernels.copies import need_not_wait
from fastsam.optim._engine import sharding
from fastsam.optim._engine.autocast import clear_cache
from fastsam.optim._engine.bucket import Bucket
from fastsam.optim._engine.flags import on, raise_flag
from fastsam.optim._engine.fused import fused_rule
from fastsam.optim._engine.hyper import HyperRows
from fastsam.optim._engine.members import layout_of, members_of
from fastsam.optim._engine.outer import GroupOptions, Groups
from fastsam.optim._engine.rounding import LostAscent
from fastsam.optim._engine.settings import check_group

_REPLACED_STORAGE = (
    "the storage of a parameter was replaced between first_step() and second_step() (p.data = ... or "
    "model.to(...)): call restore(), which finds the new storage, and begin the step again"
)


class NativeStep:
    """Owns the memory of the kernels and launches them.

    Groups and state are read from the base optimizer in every call, because users change, replace and
    load them. Memory is created on first use, and again when parameters or their storage change.

    Args:
        base: the base optimizer, whose groups have ``rho``, ``adaptive``, ``eta``,
            ``stochastic_rounding`` and ``perturb``.
        options: completes these options in the groups, whatever is loaded into the base.

    Attributes:
        climbed: whether a step is open: its ascent was made, but not its update.
        exchanged: whether the weights and the backups are swapped, so that the backups hold the perturbed
            weights.
        ascent: a unique object for each perturbation; None without one.
    """

    def __init__(self, base: Optimizer, options: GroupOptions) -> None:
        self._base = base
        self._options = options
        self._skipped: dict[torch.device, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Drop all native memory except the counters of skipped steps."""
        self.climbed = False
        self.exchanged = False
        self.ascent: object | None = None
        self._buckets: list[Bucket] = []
        self._scalars: dict[torch.device, kernels.Scalars] = {}
        self._lost: dict[torch.device, LostAscent] = {}
        self._hyper = HyperRows()
        self._layout: list[tuple[Any, ...]] = []
        self._left_out: list[Tensor] = []
        self._loss_scale: Tensor | None = None

    @property
    def _groups(self) -> Groups:
        return self._options.complete(self._base.param_groups)

    # --- the halves -----------------------------------------------------------------------------

    def climb(self, *, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Compute the norm and perturb the weights.

        Args:
            grad_scale: float32 scalar, a scaler's loss scale by which the gradients are still multiplied.
            found_inf: float32 scalar, a scaler's flag: if it is 1, the update will be skipped.

        Raises:
            RuntimeError: no parameter that the ascent perturbs has a gradient on this rank. Other ranks are
                not checked, because that would take a collective in every step.
        """
        self._make_buckets()
        perturbing = [bucket for bucket in self._buckets if bucket.perturbs]
        gradients = [bucket.take_gradients() for bucket in perturbing]
        if all(gradient is None for taken in gradients for gradient in taken):
            raise RuntimeError(
                "only parameters of groups with perturb=False have a gradient, so the ascent would move "
                "nothing: include the perturbed parameters in the first forward and backward pass, unfreeze "
                "them, or choose others to perturb"
            )
        self._hyper.write(self._groups, fused_rule(self._base), self._scalars)
        for bucket in perturbing:
            bucket.norm()
        self._share_norms()
        for device, lost in self._lost.items():
            lost.begin(
                sum(
                    bucket.elements(taken)
                    for bucket, taken in zip(perturbing, gradients, strict=True)
                    if bucket.device == device and bucket.is_16_bit
                )
            )
        self._loss_scale = (
            grad_scale  # no copy needed: a scaler creates a new tensor for every step
        )
        self.climbed = True
        self.ascent = object()
        for device in self._scalars.keys() - {bucket.device for bucket in perturbing}:
            self._scalars[
                device
            ].found_inf.zero_()  # on the other devices the perturbation clears it
        try:
            for bucket, taken in zip(perturbing, gradients, strict=True):
                bucket.perturb(taken, grad_scale=on(grad_scale, bucket.device))
            for device, scalars in self._scalars.items():
                raise_flag(scalars.found_inf, on(found_inf, device))
            clear_cache()
            if self._lost:
                self._warn_of_lost_ascents()  # an error if the user's filter makes warnings errors
        except BaseException:
            self.restore()
            raise

    def skip_where(self, flag: Tensor) -> None:
        """Skip the update of the open step if ``flag``, a float32 scalar, is not 0."""
        for device, scalars in self._scalars.items():
            raise_flag(scalars.found_inf, on(flag, device))

    def begin_without_ascent(self) -> None:
        """Begin a step without an ascent, in which the weights are their own backup."""
        self._make_buckets()
        for scalars in self._scalars.values():
            scalars.found_inf.zero_()

    def restore(self) -> None:
        """Restore the perturbed weights and abandon the step."""
        self.return_to_weights()
        self.climbed = False

    def forget_ascent(self) -> None:
        """Abandon a step whose launches were recorded but never ran: the weights are not perturbed."""
        for bucket in self._buckets:
            bucket.table.release_gradients()
            bucket.forget_backups()
        self.exchanged = self.climbed = False
        self.ascent = None

    def return_to_weights(self) -> None:
        """Restore the perturbed weights."""
        for bucket in self._buckets:
            if self.exchanged:
                bucket.forget_backups()
            bucket.restore()
        self.exchanged = False
        self.ascent = None
        clear_cache()

    def exchange(self) -> None:
        """Swap the perturbed weights and their backups.

        Raises:
            RuntimeError: the storage of a parameter was replaced; nothing was changed.
        """
        if any(bucket.moved() for bucket in self._buckets):
            raise RuntimeError(_REPLACED_STORAGE)
        for bucket in self._buckets:
            bucket.exchange()
        self.exchanged = not self.exchanged
        clear_cache()

    def backups(self) -> list[tuple[Tensor, Tensor]]:
        """Return each perturbed parameter with its backup; for a DTensor, that of the local part."""
        return [pair for bucket in self._buckets for pair in bucket.backups()]

    def descend(
        self,
        *,
        check_finite: bool,
        process_group: ProcessGroup | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Restore and update, or only restore if a gradient of either pass was not finite.

        Args:
            check_finite: check the gradients of this pass; ignored if ``found_inf`` is given.
            process_group: ranks that must skip updates together.
            grad_scale: as in :meth:`climb`.
            found_inf: as in :meth:`climb`.
        """
        if self.exchanged:
            raise RuntimeError(
                "the step cannot be finished inside unperturbed(): leave the context first, or call "
                "return_to_weights() in it"
            )
        if self.climbed and any(bucket.moved() for bucket in self._buckets):
            raise RuntimeError(_REPLACED_STORAGE)
        if self.climbed and any(p.grad is not None for p in self._left_out):
            raise RuntimeError(
                "a parameter that was frozen in first_step() has a gradient in second_step(): call "
                "restore(), and change requires_grad only between steps"
            )
        gradients = [bucket.take_gradients() for bucket in self._buckets]
        rule = fused_rule(self._base)
        self._hyper.write(self._groups, rule, self._scalars)
        if rule is not None:
            for bucket, taken in zip(self._buckets, gradients, strict=True):
                bucket.bind_state(taken, rule, self._groups, self._base.state)
        self._agree_to_skip(check_finite, process_group, found_inf)
        # Learning-rate schedulers on either optimizer check that it was stepped.
        self._base._opt_called = True  # type: ignore[attr-defined]
        if rule is None:
            self.restore()
            self._step_base(grad_scale)
            return
        for bucket, taken in zip(self._buckets, gradients, strict=True):
            bucket.update(taken, rule, grad_scale=on(grad_scale, bucket.device))
        self.climbed = False
        self.ascent = None
        clear_cache()

    def _agree_to_skip(
        self, check_finite: bool, process_group: ProcessGroup | None, found_inf: Tensor | None
    ) -> None:
        """Set the flags of all devices and ranks if any of them found a gradient that is not finite."""
        for bucket in self._buckets:
            flag = self._scalars[bucket.device].found_inf
            if found_inf is not None:
                raise_flag(flag, on(found_inf, bucket.device))
            elif check_finite:
                kernels.check(bucket.table, flag)
            sharding.all_reduce_max(flag, bucket.shard_groups)
        flags = [scalars.found_inf for scalars in self._scalars.values()]
        if process_group is not None:
            for flag in flags:
                sharding.all_reduce_max(flag, (process_group,))
        if len(flags) > 1:
            for flag in flags:
                for other in flags:
                    raise_flag(flag, on(other, flag.device))

    def _step_base(self, grad_scale: Tensor | None) -> None:
        """Call the step of a base optimizer that has no fused rule, unless the flag is set."""
        flags = [scalars.found_inf for scalars in self._scalars.values()]
        if flags and bool(flags[0].item()):  # the only host synchronization of such a step
            for skipped in self._skipped.values():
                skipped += 1
            return
        if grad_scale is not None:
            for group in self._groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(on(grad_scale, p.grad.device))
        self._base.step()

    # --- results --------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> Tensor:
        """The value of :attr:`fastsam.SAM.skipped_steps`."""
        counts = [*self._skipped.values(), torch.zeros(1, dtype=torch.int64, device="cpu")]
        return counts[0][0].clone()

    @skipped_steps.setter
    def skipped_steps(self, count: Tensor) -> None:
        for skipped in self._skipped.values():
            skipped.copy_(count)

    @property
    def unchanged_share(self) -> Tensor:
        """The value of :attr:`fastsam.SAM.unchanged_share`."""
        if not self._lost:
            return torch.zeros((), device="cpu")
        device = next(iter(self._lost))
        unchanged = torch.cat([lost.unchanged.to(device) for lost in self._lost.values()]).sum()
        elements = sum(lost.elements for lost in self._lost.values())
        return (unchanged / max(elements, 1)).float()

    @property
    def ascent_norm(self) -> Tensor:
        """The value of :attr:`fastsam.SAM.ascent_norm`."""
        if not self._scalars:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        # Every device has the squared norms of all buckets.
        norm = next(iter(self._scalars.values())).squared_norms.sum().sqrt()
        return norm if self._loss_scale is None else norm / self._loss_scale.to(norm.device)

    def unstarted(self) -> dict[int, tuple[str, ...]]:
        """Return the names of state tensors not updated yet, by the ``id`` of their parameter."""
        state = self._base.state
        return {id(p): names for bucket in self._buckets for p, names in bucket.unstarted(state)}

    def memory(self) -> tuple[object, ...]:
        """Return the identity of all kernel memory; a later result differs if a captured step is stale.

        The result holds the buckets themselves, which compare by identity. While a caller keeps it, neither
        their memory nor their ``id`` can be reused for another bucket, so equal results mean equal memory.
        """
        if any(bucket.moved() for bucket in self._buckets):
            return ()
        return tuple(
            part for bucket in self._buckets for part in (bucket, *bucket.state_addresses())
        )

    # --- memory ---------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Allocate all memory and the base optimizer's state now, and write changed settings.

        Eager steps do this themselves; the replay of a captured step cannot.
        """
        self._make_buckets()
        rule = fused_rule(self._base)
        self._hyper.write(self._groups, rule, self._scalars)
        if rule is not None:
            for bucket in self._buckets:
                trained = [p if p.requires_grad else None for p in bucket.parameters]
                bucket.bind_state(trained, rule, self._groups, self._base.state)
        for bucket in self._buckets:
            bucket.make_backup()

    def _make_buckets(self) -> None:
        """Create the buckets if the parameters, their options or their storage changed."""
        if self.climbed:
            raise RuntimeError(
                "the weights are still perturbed by an earlier step: call restore() first"
            )
        layout = layout_of(self._groups)
        if layout == self._layout and not any(bucket.moved() for bucket in self._buckets):
            return
        for group in self._groups:
            check_group(group)
        members, left_out = members_of(self._groups)
        for bucket in self._buckets:
            for parameter, names in bucket.unstarted(self._base.state):
                self._base.state[parameter].update(dict.fromkeys(names))
        self._buckets = [Bucket(rows, slot=slot) for slot, rows in enumerate(members)]
        self._lost = {
            device: self._lost.get(device) or LostAscent(device)
            for device in dict.fromkeys(
                b.device for b in self._buckets if b.perturbs and b.is_16_bit
            )
        }
        devices = dict.fromkeys(bucket.device for bucket in self._buckets)
        # The kernels count on every device that has parameters, so the counts are equal.
        count = self.skipped_steps
        self._skipped = {
            device: self._skipped[device]
            if device in self._skipped
            else count.to(device, non_blocking=need_not_wait(device)).reshape(1)
            for device in devices
        }
        self._scalars = {device: self._new_scalars(device) for device in devices}
        counted: set[torch.device] = set()
        for bucket in self._buckets:
            bucket.attach(self._scalars[bucket.device], counts_skips=bucket.device not in counted)
            counted.add(bucket.device)
        self._hyper = HyperRows()
        self._layout = layout
        self._left_out = left_out

    def _new_scalars(self, device: torch.device) -> kernels.Scalars:
        kinds = {bucket.table.sum_dtype for bucket in self._buckets if bucket.device == device}
        return kernels.Scalars.zeros(
            groups=len(self._groups),
            tables=len(self._buckets),
            dtype=torch.float64 if torch.float64 in kinds else torch.float32,
            device=device,
            skipped_steps=self._skipped[device],
            unchanged=self._lost[device].unchanged if device in self._lost else None,
        )

    def _share_norms(self) -> None:
        """Copy the squared norms of every bucket to all devices."""
        if len(self._scalars) < 2:
            return
        for bucket in self._buckets:
            part = self._scalars[bucket.device].squared_norms[bucket.slot]
            for device, scalars in self._scalars.items():
                if device != bucket.device:
                    scalars.squared_norms[bucket.slot].copy_(
                        part, non_blocking=need_not_wait(device)
                    )

    def _warn_of_lost_ascents(self) -> None:
        """Check for lost ascents if 16-bit weights are rounded to nearest and rho is not 0."""
        if self._hyper.any_rho() and any(
            bucket.perturbs and bucket.is_16_bit and bucket.rounds_to_nearest
            for bucket in self._buckets
        ):
            for lost in self._lost.values():
                lost.end()
