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
"""Where parameter groups and state dicts keep the number of attempted steps."""


class AscentSteps(NamedTuple):
    """The steps at which an ascent may be due, counted from 0.

    Attributes:
        start: the first of them.
        interval: steps from one to the next.
        stop: the step before which they end; None for no end.
    """

    start: int
    interval: int
    stop: int | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> AscentSteps:
        """Return those of a parameter group or another mapping with these keys.

        Raises:
            ValueError: they are not integers with ``0 <= start < stop`` and ``interval >= 1``.
        """
        start, interval, stop = (group[name] for name in cls._fields)
        check_number("start", start, whole=True)
        check_number("interval", interval, low=1, whole=True)
        if stop is not None:
            check_number("stop", stop, whole=True)
            if stop <= start:
                raise ValueError(
                    f"stop must be greater than start, got start={start!r} and stop={stop!r}: no ascent "
                    "would ever be due; raise stop, or pass stop=None for no end"
                )
        return cls(start, interval, stop)

    def phase(self, step: int) -> int | None:
        """Return the number of steps since the last of these, 0 at one of them; None outside."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return None
        return (step - self.start) % self.interval


_AGREED = (*AscentSteps._fields, "perturb")
"""Options that are checked for all groups together."""


def agreed_steps(groups: Iterable[Mapping[str, Any]]) -> AscentSteps:
    """Return the ascent steps that all parameter groups name.

    Raises:
        ValueError: they are invalid, two groups differ, or ``perturb`` is False in all of them.
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
                    f"{index}: the passes of a step are the same for all groups; set {name} in every group. "
                    "To keep a group out of the ascent, set perturb=False in it"
                )
    if found is None:
        raise ValueError("there is no parameter group")
    if not perturbs:
        raise ValueError(
            "perturb=False in every parameter group: SAM would have nothing to perturb. Leave perturb=True, "
            "the default, in one group at least, or train with the base optimizer alone"
        )
    return found


class AscentPolicy:
    """Decide whether an ascent is due, and count the attempted steps.

    The options and the counter live in the parameter groups, so that wrappers and checkpoints carry them.
    The first group's counter is the one that counts.

    A decision holds until its step ends, even if a scheduler or the user changes an option in between:
    the passes of a step must agree on how many they are.

    Args:
        base: the base optimizer.
        options: completes its groups.

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
        """Steps completed so far, skipped ones included."""
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
        """Decide for the current step, whatever the options say."""
        self._decided = due

    def phase(self) -> int | None:
        """Return the number of steps since the last ascent was due, 0 where one is; None where none is.

        None before ``start``, from ``stop`` on, and while rho is 0 in all groups that are perturbed.
        """
        groups = self._groups
        steps = self._steps_of(groups)
        return steps.phase(int(groups[0][COUNTER])) if _any_rho(groups) else None

    def steps(self) -> AscentSteps:
        """Return the ascent steps of all groups, and make them the defaults of groups that will be added.

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
        """Raise ValueError on every rank where the ranks' policies or kernels differ.

        Asks the other ranks before the first step and before the first one after a change of the options,
        never otherwise. Ranks that differ would wait for each other in the second pass forever.

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
            "ascent_due": self.due,  # a rank may have looked at it before the change and another after
        }
        backend = backend_of_groups(groups)
        parameters = [p for group in groups for p in group["params"]]
        for rank, (there, other) in sharding.gathered((here, backend), parameters, process_group):
            if other != backend:
                raise ValueError(
                    f"ranks must run the same kernels, got {backend!r} here and {other!r} on rank {rank}: "
                    "their weights would drift apart by rounding. Set FASTSAM_KERNELS=torch on all ranks, or "
                    "get the kernels for all; `fastsam doctor` tells why they are missing"
                )
            for name, value in here.items():
                if there[name] != value:
                    raise ValueError(
                        f"ranks must agree on the ascent policy, got {name}={value!r} here and "
                        f"{name}={there[name]!r} on rank {rank}; construct SAM with the same options on all "
                        "ranks, load the same checkpoint, and change options in the same step"
                    )
        self._agreed = steps, any_rho

    def restart(self, attempted_steps: int) -> None:
        """Follow the groups of a checkpoint: make a new decision and compare the ranks again."""
        self.abandon()
        self._agreed = None
        self.attempted_steps = attempted_steps
        self.steps()  # groups that are added through the base optimizer have them, too

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
    """Return whether rho is not 0; one on a device counts as such, because reading it would wait."""
    if isinstance(rho, Tensor) and rho.device.type != "cpu":
        return True
    return bool(rho != 0)
