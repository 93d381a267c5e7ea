"""The ascent policy: which steps of SAM make an ascent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from fastsam.optim._engine import sharding
from fastsam.optim._engine.outer import GroupOptions, Groups, backend_of_groups
from fastsam.optim._engine.settings import check_number

COUNTER = "attempted_steps"
"""Key of the number of attempted steps in parameter groups and state dicts."""


class AscentSteps(NamedTuple):
    """The steps at which an ascent may be due, counted from 0.

    Attributes:
        start: first step with an ascent.
        interval: number of steps from one ascent to the next.
        stop: first step from which on no ascent is due; None for no limit.
    """

    start: int
    interval: int
    stop: int | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> AscentSteps:
        """Read the ascent steps from a parameter group, or another mapping with these keys.

        Raises:
            ValueError: the values are not integers with ``0 <= start < stop`` and ``interval >= 1``.
        """
        start, interval, stop = (group[name] for name in cls._fields)
        check_number("start", start, whole=True)
        check_number("interval", interval, low=1, whole=True)
        if stop is not None:
            check_number("stop", stop, whole=True)
            if stop <= start:
                raise ValueError(
                    f"stop must be greater than start, got start={start!r} and stop={stop!r}: no ascent "
                    "would ever be due; raise stop, or pass stop=None for no limit"
                )
        return cls(start, interval, stop)

    def phase(self, step: int) -> int | None:
        """Return the number of steps since the last ascent step, 0 at one; None outside start and stop."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return None
        return (step - self.start) % self.interval


_AGREED = (*AscentSteps._fields, "perturb")
"""Options that are checked over all groups."""


def agreed_steps(groups: Iterable[Mapping[str, Any]]) -> AscentSteps:
    """Return the ascent steps, which must be equal in all parameter groups.

    Raises:
        ValueError: a value is invalid, two groups differ, or ``perturb`` is False in all groups.
    """
    found: AscentSteps | None = None
    perturbs = False
    for index, group in enumerate(groups):
        steps = AscentSteps.of(group)
        perturbs = perturbs or bool(group["perturb"])
        if found is None:
            found = steps
        for name, first, other in zip(AscentSteps._fields, found, steps, strict=True):
            if first != other:
                raise ValueError(
                    f"parameter groups must agree on {name}, got {first!r} in group 0 and {other!r} in group "
                    f"{index}: a step makes the same passes for all groups. Set {name} to one value in every "
                    "group; to exclude a group from the ascent, set perturb=False in it"
                )
    if found is None:
        raise ValueError("the optimizer has no parameter group; pass at least one")
    if not perturbs:
        raise ValueError(
            "perturb=False in every parameter group, so SAM has nothing to perturb. Keep perturb=True, the "
            "default, in at least one group, or train with the base optimizer alone"
        )
    return found


class AscentPolicy:
    """Decides whether an ascent is due, and counts the attempted steps.

    The options and the counter are stored in the parameter groups, so that wrappers and checkpoints include
    them. All groups have the counter; the first group's is read.

    A decision holds until its step ends, even if a scheduler or the user changes an option in between: the
    number of passes must not change within a step.

    Args:
        base: the base optimizer.
        options: completes the groups of the base optimizer.

    Attributes:
        begun: whether ``first_step()`` of the current step was called.
    """

    def __init__(self, base: Optimizer, options: GroupOptions) -> None:
        self._base = base
        self._options = options
        self._given: list[list[Any]] = []
        self._agreed: tuple[AscentSteps, bool] | None = None
        self._decided: bool | None = None
        self.begun = False

    @property
    def _groups(self) -> Groups:
        return self._options.complete(self._base.param_groups)

    @property
    def attempted_steps(self) -> int:
        """Number of completed steps, including skipped ones."""
        return int(self._groups[0][COUNTER])

    @attempted_steps.setter
    def attempted_steps(self, count: int) -> None:
        for group in self._groups:
            group[COUNTER] = count

    @property
    def due(self) -> bool:
        """Whether the current step makes an ascent.

        Raises:
            ValueError: an option is invalid, or groups differ.
        """
        if self._decided is None:
            self._decided = self.phase() == 0
        return self._decided

    def decide(self, due: bool) -> None:
        """Set the decision for the current step, regardless of the options."""
        self._decided = due

    def phase(self) -> int | None:
        """Return the number of steps since an ascent was last due, 0 if one is due now.

        None before ``start``, from ``stop`` on, and while rho is 0 in all perturbed groups.
        """
        groups = self._groups
        steps = self._steps_of(groups)
        return steps.phase(int(groups[0][COUNTER])) if _any_rho(groups) else None

    def steps(self) -> AscentSteps:
        """Return the ascent steps of all groups, and make them the defaults of groups added later.

        Raises:
            ValueError: an option is invalid, groups differ, or none is perturbed.
        """
        return self._steps_of(self._groups)

    def _steps_of(self, groups: Groups) -> AscentSteps:
        given = [[group[name] for name in _AGREED] for group in groups]
        if given != self._given:
            self._steps = agreed_steps(groups)
            self._given = given
            for defaults in (self._options.defaults, self._base.defaults):
                defaults.update(self._steps._asdict())
        return self._steps

    def agree(self, process_group: ProcessGroup | None) -> None:
        """Raise ValueError on every rank if the ranks differ in their policy or kernels.

        Ranks that differ would wait for each other in the second pass forever. They are compared before the
        first step, and before the first step after an option has changed; other steps communicate nothing.

        Args:
            process_group: the ranks that train together. None: those that share sharded parameters, or else
                all ranks of the default group.
        """
        groups = self._groups
        steps, any_rho = self._steps_of(groups), _any_rho(groups)
        if (steps, any_rho) == self._agreed:
            return
        here = {
            **steps._asdict(),
            "any rho": any_rho,
            COUNTER: self.attempted_steps,
            "ascent_due": self.due,  # one rank may have read it before an option changed, another after
        }
        backend = backend_of_groups(groups)
        parameters = [p for group in groups for p in group["params"]]
        for rank, (there, other) in sharding.gathered((here, backend), parameters, process_group):
            if other != backend:
                raise ValueError(
                    f"ranks must run the same kernels, got {backend!r} here and {other!r} on rank {rank}: "
                    "their weights would diverge by rounding. Set FASTSAM_KERNELS=torch on all ranks, or "
                    "install the kernels on all; `fastsam doctor` explains why they are missing"
                )
            for name, value in here.items():
                if there[name] != value:
                    raise ValueError(
                        f"ranks must agree on the ascent policy, got {name}={value!r} here and "
                        f"{name}={there[name]!r} on rank {rank}; on all ranks construct SAM with the same "
                        "options, load the same checkpoint, and change options in the same step. If each "
                        "rank trains a model of its own, pass process_group="
                        "torch.distributed.new_group([rank], use_local_synchronization=True)"
                    )
        self._agreed = steps, any_rho

    def restart(self, attempted_steps: int) -> None:
        """Reset to the groups of a loaded checkpoint: decide again and compare the ranks again."""
        self.abandon()
        self._agreed = None
        self.attempted_steps = attempted_steps
        self.steps()  # updates the defaults of groups that are added later through the base optimizer

    def end(self) -> None:
        """End a step and count it."""
        self.attempted_steps = self.attempted_steps + 1
        self.abandon()

    def abandon(self) -> None:
        """End a step without counting it."""
        self._decided = None
        self.begun = False


def _any_rho(groups: Groups) -> bool:
    return any(group["perturb"] and _is_nonzero(group["rho"]) for group in groups)


def _is_nonzero(rho: float | Tensor) -> bool:
    """Return whether rho is not 0; True for a device tensor, which the host would wait for."""
    if isinstance(rho, Tensor) and rho.device.type != "cpu":
        return True
    return bool(rho != 0)
