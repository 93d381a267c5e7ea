"""The base class of optimizers around another one, with the same groups, state and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.kernels.backends import Backend, backend_of
from fastsam.optim._engine import state_dicts

Groups = list[dict[str, Any]]


def backend_of_groups(groups: Groups) -> Backend:
    """Return ``"torch"`` where a parameter is on a device without kernels, and ``"native"`` otherwise."""
    devices = {p.device for group in groups for p in group["params"]}
    return "torch" if "torch" in map(backend_of, devices) else "native"


class GroupOptions:
    """Keep an optimizer's own options in parameter groups that others replace.

    ``base.load_state_dict(...)`` replaces the groups by those of a run that may not know the options, and
    so may an assignment. The groups before are kept here by reference: they hold the values of the moment.

    Args:
        defaults: every option, with the value for groups that never had one.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self.defaults = dict(defaults)
        self._known: Groups = []

    def complete(self, groups: Groups) -> Groups:
        """Return ``groups``, the options they lack filled in from the groups that they replaced."""
        known = self._known
        if len(groups) == len(known) and all(map(is_, groups, known)):
            return groups
        for index, group in enumerate(groups):
            for name in self.defaults:
                group.setdefault(name, self.filled(index, group, name))
        self._known = list(groups)
        return groups

    def filled(self, index: int, group: Mapping[str, Any], name: str) -> Any:
        """Return the value that :meth:`complete` gives an option of a group in a place of the list."""
        if name in group:
            return group[name]
        before = self._known[index] if index < len(self._known) else self.defaults
        return before.get(name, self.defaults[name])


class OuterOptimizer(Optimizer):
    """An optimizer around a base optimizer, with the same groups, state and defaults.

    They are properties that look at the base optimizer, so that both agree whatever replaces them, through
    either object or through a wrapper that forwards reads and keeps writes, as Lightning's does. So is the
    mark by which a learning rate scheduler knows that a step was made.

    Args:
        base_optimizer: what is wrapped. Its groups and defaults get the options.
        options: options of the outer optimizer that live in the groups, with their defaults.
    """

    def __init__(self, base_optimizer: Optimizer, options: Mapping[str, Any]) -> None:
        self.base_optimizer = base_optimizer
        self.options = GroupOptions(options)
        self.options.complete(base_optimizer.param_groups)
        # Groups may be added through either object.
        base_optimizer.defaults.update(options)
        # What Optimizer.__init__ makes besides groups and state, as for a copy.
        super().__setstate__({})

    @property
    def param_groups(self) -> Groups:
        """The base optimizer's groups.

        An assignment replaces them there. What a group lacks comes, for options of this optimizer, from the
        group in its place before, and from the defaults otherwise.
        """
        return self.options.complete(self.base_optimizer.param_groups)

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        self._replace_groups(groups)

    def _replace_groups(self, groups: Groups) -> None:
        self.options.complete(self.base_optimizer.param_groups)  # they fill what ``groups`` lack
        self.options.complete(groups)
        if not isinstance(self.base_optimizer, OuterOptimizer):
            for group in groups:
                for name, default in self.base_optimizer.defaults.items():
                    group.setdefault(name, default)
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, which include this optimizer's."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    @property
    def _opt_called(self) -> bool:
        return getattr(self.base_optimizer, "_opt_called", False)

    @_opt_called.setter
    def _opt_called(self, called: bool) -> None:
        self.base_optimizer._opt_called = called  # type: ignore[attr-defined]

    @property
    def backend(self) -> Backend:
        """What runs the steps: ``"native"`` kernels, or ``"torch"`` operations where a device has none.

        With parameters on several devices ``"torch"`` as soon as one of them has no kernels. See
        :func:`fastsam.build_info` for the reason and ``FASTSAM_KERNELS`` for the choice.
        """
        return backend_of_groups(self.param_groups)

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights as they were."""
        return False

    @property
    def skipped_steps(self) -> Tensor:
        """Updates skipped because a gradient was not finite: int64 scalar, 0 where none is ever skipped."""
        return torch.zeros((), dtype=torch.int64)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which may have options of this optimizer and of the base."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; its groups hold this optimizer's options too."""
        return state_dicts.save(self, self._pack)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; options that it lacks stay as they are."""
        state_dicts.load(self, self._unpack, state_dict)

    def _pack(self) -> dict[str, Any]:
        self.options.complete(self.base_optimizer.param_groups)
        return self.base_optimizer.state_dict()

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        self.options.complete(self.base_optimizer.param_groups)
        self.base_optimizer.load_state_dict(state_dict)
        self.options.complete(self.base_optimizer.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        self.options.complete(self.base_optimizer.param_groups)
        # Hooks belong to this object, as in torch.optim; a scheduler has put a step of its own here.
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "step"
        }
