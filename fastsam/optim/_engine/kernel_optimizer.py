"""Counters, state dicts and copies of an optimizer that steps on the native kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastsam.optim._engine import sharding
from fastsam.optim._engine.native_step import NativeStep
from fastsam.optim._engine.outer import Groups, OuterOptimizer
from fastsam.optim._engine.policy import COUNTER, AscentPolicy, agreed_steps
from fastsam.optim._engine.settings import check_group, check_number
from fastsam.optim._engine.untraced import untraced

_LEGACY_STATE = ("old_p", "e_w")
"""Copies of the weights in checkpoints of other SAM implementations, which are dropped."""


class KernelOptimizer(OuterOptimizer):
    """An optimizer around a base optimizer whose steps run on the native kernels.

    Attributes:
        native_step: the two halves of the step, and the memory that they work on.
        policy: which steps ascend, and how many steps there were.
        first_attempt: number of attempted steps before the first, also after a checkpoint without one.
        process_group: ranks that must skip together.
    """

    native_step: NativeStep
    policy: AscentPolicy
    first_attempt: int
    process_group: ProcessGroup | None

    def _begin(self) -> None:
        """Create what neither a copy nor a file contains."""
        self.native_step = NativeStep(self.base_optimizer, self.options)
        self.policy = AscentPolicy(self.base_optimizer, self.options)

    @property
    def ascent_due(self) -> bool:
        """Whether the current step makes an ascent, and with it a second pass; a bool on the host.

        True at attempted step n where ``start <= n < stop``, ``(n - start) % interval == 0`` and a group with
        ``perturb=True`` has a rho other than 0. A rho on the CPU is read; one on a device counts as nonzero,
        because reading it would wait. Constant from the first look at it, or the first call of a step, until
        the step ends: an option that is changed in between takes effect at the next step.

        Raises:
            ValueError: start, interval or stop is invalid, or differs between groups; or no group is
                perturbed.
        """
        return self.policy.due

    @property
    def attempted_steps(self) -> int:
        """Steps completed so far, skipped ones included; those given up with ``restore()`` do not count."""
        return self.policy.attempted_steps

    @untraced
    @torch.no_grad()
    def restore(self) -> None:
        """Give up a step between its two halves and restore the weights to w, bit for bit.

        Call it at any time; between steps it does nothing. The step does not count as attempted.
        """
        if self.native_step.climbed:
            self.native_step.restore()
        self.policy.abandon()

    @untraced
    @torch.no_grad()
    def prepare(self) -> None:
        """Allocate all memory that a step needs now: the base optimizer's state and the backup.

        Otherwise the first update allocates the state and the first ascent the backup of the weights, which
        is late for a run whose ascents begin late. Weights and the course of the training stay as they are.

        Raises:
            ValueError: as ``first_step``.
        """
        self.policy.steps()
        self.native_step.prepare()

    @property
    def skipped_steps(self) -> Tensor:
        """Updates skipped because a gradient was not finite: int64 scalar on the parameters' device.

        Reading its value on the host waits for the device; nothing in a step does.
        """
        return self.native_step.skipped_steps

    @property
    def ascent_norm(self) -> Tensor:
        """``||T_w g||`` of the last ascent over all groups: float64 scalar on the parameters' device.

        For SAM the 2-norm of the gradients of the first pass as ``first_step`` found them, clipped or not,
        without a scaler's loss scale; for ASAM each is multiplied by ``|w| + eta`` first. Where parameters
        are sharded it is that of all ranks. It comes from the ascent itself, so that nothing is read again
        and nothing waits; not finite where the step was skipped for its first gradient, and 0 before the
        first ascent and after a state dict was loaded.
        """
        return self.native_step.ascent_norm

    @property
    def unchanged_share(self) -> Tensor:
        """Share of the elements of 16-bit weights that the last ascent was too small to change.

        A float32 scalar on the parameters' device, 0 without 16-bit weights; of this rank's part where
        parameters are sharded. Above one half a warning is given, once, some steps later on CUDA because
        nothing waits for the device.
        """
        return self.native_step.unchanged_share

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which may have its own values of SAM's options."""
        self._refuse_midway("add_param_group()")
        check_group(param_group)
        self.policy.steps()  # the new group gets those of the present ones
        self._check_together([*self.param_groups, param_group])
        super().add_param_group(param_group)

    def _replace_groups(self, groups: Groups) -> None:
        self._refuse_midway("assigning param_groups")
        for group in groups:
            check_group(group)
        self.policy.steps()  # the new groups get those of the present ones
        self._check_together(groups)
        super()._replace_groups(groups)

    def _check_together(self, groups: Groups) -> None:
        """Raise ValueError where groups differ in their ascent steps or none is perturbed.

        What a group lacks counts as what it would get in its place.
        """
        agreed_steps(
            {name: self.options.filled(index, group, name) for name in self.options.defaults}
            for index, group in enumerate(groups)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict, without copies of weights.

        Its groups have SAM's settings; ``attempted_steps`` is the counter of this name.
        """
        self._refuse_midway("state_dict()")
        return super().state_dict()

    def _pack(self) -> dict[str, Any]:
        packed = super()._pack()
        for index, names in self._unstarted().items():
            if index in packed["state"]:
                packed["state"][index] = {**packed["state"][index], **dict.fromkeys(names)}
        return {**packed, COUNTER: self.attempted_steps}

    def _unstarted(self) -> dict[int, tuple[str, ...]]:
        """Return the names of state that no update has reached, by index of the parameter.

        torch's first update must find none: it copies the gradient where there is no momentum buffer, and
        dampens it where there is one.
        """
        unstarted = self.native_step.unstarted()
        return {
            index: unstarted[id(p)]
            for index, p in enumerate(self._parameters())
            if id(p) in unstarted
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the reference implementation, or of the base optimizer.

        Copies of weights in old checkpoints are dropped, and what they lack is filled from the current
        groups, but the counter of attempted steps from ``first_attempt``; the rest is the base optimizer's
        ``load_state_dict``.

        Raises:
            RuntimeError: called between ``first_step`` and ``second_step``.
            ValueError: the groups do not match, or a setting in them is not one.
        """
        self._refuse_midway("load_state_dict()")
        super().load_state_dict(state_dict)

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        state = {
            index: {key: value for key, value in entry.items() if key not in _LEGACY_STATE}
            for index, entry in state_dict["state"].items()
        }
        groups = [
            {**{key: value for key, value in current.items() if key != "params"}, **saved}
            for saved, current in zip(state_dict["param_groups"], self.param_groups, strict=False)
        ]
        groups += state_dict["param_groups"][len(groups) :]
        for group in groups:
            check_group(group)
        self._check_together(groups[: len(self.param_groups)])
        count = _attempted_steps(state_dict, self.first_attempt)
        super()._unpack(
            {
                **{key: value for key, value in state_dict.items() if key != COUNTER},
                "state": {index: entry for index, entry in state.items() if entry},
                "param_groups": groups,
            }
        )
        self.native_step.forget()
        self.policy.restart(count)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_midway("pickling or copying")
        state = super().__getstate__()
        del state["native_step"], state["policy"]
        state["process_group"] = self.process_group and _Handle(self.process_group)
        return {**state, "unstarted": self._unstarted()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = state.copy()
        unstarted = state.pop("unstarted")
        handle = state["process_group"]
        super().__setstate__({**state, "process_group": handle.group if handle else None})
        self._begin()
        parameters = self._parameters()
        for index, names in unstarted.items():
            self.state[parameters[index]].update(dict.fromkeys(names))

    def _is_blank(self) -> bool:
        """Return whether a step only creates state: torch.distributed.checkpoint fills an optimizer so."""
        if self.state or not all(_is_zero(group.get("lr", 0.0)) for group in self.param_groups):
            return False
        gradients = [p.grad for p in self._parameters()]
        present = [sharding.local(gradient) for gradient in gradients if gradient is not None]
        return bool(present) and not any(bool(gradient.any()) for gradient in present)

    def _has_no_gradient(self) -> bool:
        return all(p.grad is None for group in self.param_groups for p in group["params"])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _refuse_midway(self, what: str) -> None:
        if self.native_step.climbed:
            raise RuntimeError(
                f"{what} between first_step() and second_step(): the weights are perturbed. Finish the "
                "step, or give it up with restore(), first"
            )


def _attempted_steps(state_dict: Mapping[str, Any], otherwise: int) -> int:
    """Return the counter of a state dict; a wrapper may have dropped all but state and groups."""
    counts = [state_dict, *state_dict["param_groups"]]
    count = next((each[COUNTER] for each in counts if COUNTER in each), otherwise)
    check_number(COUNTER, count, whole=True)
    return int(count)


def _is_zero(lr: float | Tensor) -> bool:
    """Return whether a learning rate is 0, as in a blank step; one on a device, which would wait, is not."""
    return not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0


class _Handle:
    """Carry a process group through a copy, which has the same one, and refuse to pickle it."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "an optimizer with process_group= cannot be pickled, because the group belongs to this "
            "process; save its state_dict() instead"
        )
