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
"""State keys with copies of the weights in checkpoints of other SAM implementations; they are dropped."""


class KernelOptimizer(OuterOptimizer):
    """An optimizer around a base optimizer whose steps run on the native kernels.

    Attributes:
        native_step: the two halves of the step and their memory.
        policy: decides which steps make an ascent, and counts the attempted steps.
        first_attempt: initial number of attempted steps, also after loading a checkpoint without a counter.
        process_group: ranks that must skip updates together.
    """

    native_step: NativeStep
    policy: AscentPolicy
    first_attempt: int
    process_group: ProcessGroup | None

    def _begin(self) -> None:
        """Create the attributes that copies and pickles omit."""
        self.native_step = NativeStep(self.base_optimizer, self.options)
        self.policy = AscentPolicy(self.base_optimizer, self.options)

    @property
    def ascent_due(self) -> bool:
        """Whether the current step makes an ascent, and therefore a second pass; a bool on the host.

        True at attempted step n where ``start <= n < stop``, ``(n - start) % interval == 0`` and a group with
        ``perturb=True`` has a nonzero rho. A rho tensor on a device counts as nonzero, because reading it
        would make the host wait. The value is fixed when it is first read or the step begins, until the step
        ends: options changed in between take effect in the next step.

        Raises:
            ValueError: start, interval or stop is invalid, or differs between groups; or no group is
                perturbed.
        """
        return self.policy.due

    @property
    def peers(self) -> ProcessGroup | None:
        """The ranks of ``process_group``; None if this rank is alone in it."""
        return sharding.several(self.process_group)

    @property
    def attempted_steps(self) -> int:
        """Number of completed steps, including skipped ones but not those abandoned with ``restore()``."""
        return self.policy.attempted_steps

    @untraced
    @torch.no_grad()
    def restore(self) -> None:
        """Abandon a step between its two halves and restore the weights to w, bit for bit.

        It may be called at any time and does nothing between steps. The abandoned step is not counted.
        """
        if self.native_step.climbed:
            self.native_step.restore()
        self.policy.abandon()

    @untraced
    @torch.no_grad()
    def prepare(self) -> None:
        """Allocate all memory of a step now: the base optimizer's state and the backup of the weights.

        By default the first update allocates the state and the first ascent allocates the backup, so a run
        with late ascents would run out of memory late. The weights and later steps are not affected.

        Raises:
            RuntimeError: called between ``first_step`` and ``second_step``.
            ValueError: as in ``first_step``.
        """
        self._refuse_midway("prepare()")
        self.policy.steps()
        self.native_step.prepare()

    @property
    def skipped_steps(self) -> Tensor:
        """Number of updates skipped for a non-finite gradient: a new int64 scalar on the parameters' device.

        Before the first step it is on the CPU. Reading its value makes the host wait for the device; the
        steps themselves never do.
        """
        return self.native_step.skipped_steps

    @property
    def ascent_norm(self) -> Tensor:
        """``||T_w g||`` of the last ascent over all groups: scalar on the parameters' device.

        It is float64 with native kernels. PyTorch operations compute it in float32, unless a parameter is
        float64; see :attr:`backend`.

        For SAM this is the 2-norm of the gradients that ``first_step`` used, after any clipping and without a
        scaler's loss scale. For ASAM each gradient is multiplied by ``|w| + eta`` first. For sharded
        parameters it is the norm over all ranks. The ascent has computed it, so reading the attribute neither
        reads the gradients nor waits. It is not finite if the first gradient was not, and 0 before the first
        ascent and after loading a state dict.
        """
        return self.native_step.ascent_norm

    @property
    def unchanged_share(self) -> Tensor:
        """Fraction of the elements of 16-bit weights that the last ascent was too small to change.

        A float32 scalar on the parameters' device; 0 without 16-bit weights. For sharded parameters it covers
        this rank's part. If it exceeds one half, the optimizer warns once; on CUDA some steps later, because
        the host does not wait for the device.
        """
        return self.native_step.unchanged_share

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which may set SAM's options."""
        self._refuse_midway("add_param_group()")
        check_group(param_group)
        self.policy.steps()  # makes start, interval and stop of the current groups the new group's defaults
        self._check_together([*self.param_groups, param_group])
        super().add_param_group(param_group)

    def _replace_groups(self, groups: Groups) -> None:
        self._refuse_midway("assigning param_groups")
        for group in groups:
            check_group(group)
        self.policy.steps()  # as in add_param_group
        self._check_together(groups)
        super()._replace_groups(groups)

    def _check_together(self, groups: Groups) -> None:
        """Raise ValueError if groups differ in their ascent steps or none is perturbed.

        Options missing in a group are checked with the values that would be filled in.
        """
        agreed_steps(
            {name: self.options.filled(index, group, name) for name in self.options.defaults}
            for index, group in enumerate(groups)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict, without copies of weights.

        Its groups include SAM's options. The key ``attempted_steps`` holds the counter.
        """
        if self.native_step.ascent is not None:
            self._refuse_midway("state_dict()")
        return super().state_dict()

    def _pack(self) -> dict[str, Any]:
        packed = super()._pack()
        for index, names in self._unstarted().items():
            if index in packed["state"]:
                packed["state"][index] = {**packed["state"][index], **dict.fromkeys(names)}
        return {**packed, COUNTER: self.attempted_steps}

    def _unstarted(self) -> dict[int, tuple[str, ...]]:
        """Return the names of state tensors that have not been updated yet, by index of the parameter.

        Checkpoints and copies must not contain them: torch's first update copies the gradient if there is no
        momentum buffer, and dampens it if there is one.
        """
        unstarted = self.native_step.unstarted()
        return {
            index: unstarted[id(p)]
            for index, p in enumerate(self._all_parameters())
            if id(p) in unstarted
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the reference implementation, or of the base optimizer.

        Copies of weights in old checkpoints are dropped. Options missing in a checkpoint keep their current
        values; a missing counter of attempted steps is set to ``first_attempt``.

        Raises:
            RuntimeError: called between ``first_step`` and ``second_step``.
            ValueError: the groups do not match, or an option in them is invalid.
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
        parameters = self._all_parameters()
        for index, names in unstarted.items():
            self.state[parameters[index]].update(dict.fromkeys(names))

    def _has_no_gradient(self) -> bool:
        return all(p.grad is None for group in self.param_groups for p in group["params"])

    def _refuse_midway(self, what: str) -> None:
        if self.native_step.climbed:
            raise RuntimeError(
                f"{what} between first_step() and second_step(): the weights are perturbed. Finish the "
                "step, or abandon it with restore(), first"
            )


def _attempted_steps(state_dict: Mapping[str, Any], otherwise: int) -> int:
    """Return the counter of a state dict or of its groups: some wrappers keep only state and groups."""
    counts = [state_dict, *state_dict["param_groups"]]
    count = next((each[COUNTER] for each in counts if COUNTER in each), otherwise)
    check_number(COUNTER, count, whole=True)
    return int(count)


class _Handle:
    """A process group that deepcopy shares with the copy and pickle refuses."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return self

    def __reduce__(self) -> str:
        raise TypeError(
            "an optimizer with process_group= cannot be pickled, because the group exists only in this "
            "process; save its state_dict() instead"
        )
