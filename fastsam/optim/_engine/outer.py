"""Base class of optimizers around another one, with the same groups, state and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import local_part
from fastsam.kernels.backends import Backend, backend_of
from fastsam.optim._engine import sharding, state_dicts

Groups = list[dict[str, Any]]


def backend_of_groups(groups: Groups) -> Backend:
    """Return ``"torch"`` if any parameter is on a device without kernels, and ``"native"`` otherwise."""
    devices = {p.device for group in groups for p in group["params"]}
    return "torch" if "torch" in map(backend_of, devices) else "native"


class GroupOptions:
    """Keeps an outer optimizer's options in parameter groups when the groups are replaced.

    ``base.load_state_dict(...)`` and assignments replace the groups by others that may lack the options.
    This object holds references to the previous groups, which have the latest values, and copies them over.

    Args:
        defaults: every option, with the value for groups that have no predecessor.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self.defaults = dict(defaults)
        self._known: Groups = []

    def complete(self, groups: Groups) -> Groups:
        """Fill missing options of ``groups`` from the groups that they replaced, and return ``groups``."""
        known = self._known
        if len(groups) == len(known) and all(map(is_, groups, known)):
            return groups
        for index, group in enumerate(groups):
            for name in self.defaults:
                group.setdefault(name, self.filled(index, group, name))
        self._known = list(groups)
        return groups

    def filled(self, index: int, group: Mapping[str, Any], name: str) -> Any:
        """Return the value of an option after :meth:`complete`, for the group at position ``index``."""
        if name in group:
            return group[name]
        before = self._known[index] if index < len(self._known) else self.defaults
        return before.get(name, self.defaults[name])


class OuterOptimizer(Optimizer):
    """Base class of optimizers around a base optimizer, with the same groups, state and defaults.

    These are properties that read from and write to the base optimizer. Both objects therefore agree even if
    one is replaced through either object, or through a wrapper such as Lightning's, which forwards reads but
    stores writes itself. ``_opt_called``, by which learning-rate schedulers detect a step, is shared too.

    Args:
        base_optimizer: the optimizer to wrap. Its groups and defaults get the options.
        options: options of the outer optimizer that are stored in the groups, with their defaults.
    """

    def __init__(self, base_optimizer: Optimizer, options: Mapping[str, Any]) -> None:
        self.base_optimizer = base_optimizer
        self.options = GroupOptions(options)
        self.options.complete(base_optimizer.param_groups)
        # Groups may be added through either object.
        base_optimizer.defaults.update(options)
        # Creates hooks and profiler names as Optimizer.__init__ does, without groups and state.
        super().__setstate__({})

    @property
    def param_groups(self) -> Groups:
        """The base optimizer's groups.

        Assigning replaces them in the base optimizer. Missing options of this optimizer are filled from the
        previous group at the same position, other missing options from the defaults.
        """
        return self.options.complete(self.base_optimizer.param_groups)

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        self._replace_groups(groups)

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> None:
        """Raise ValueError if an option of a new group is invalid; options may be missing."""

    def _replace_groups(self, groups: Groups) -> None:
        for group in groups:
            self._check_group(group)
        self.options.complete(
            self.base_optimizer.param_groups
        )  # the values to fill ``groups`` from
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
        """Backend of the steps: ``"native"`` kernels, or ``"torch"`` operations for devices without kernels.

        It is ``"torch"`` if any parameter is on a device without kernels. :func:`fastsam.build_info` gives
        the reason; the environment variable ``FASTSAM_KERNELS`` sets the backend.
        """
        return backend_of_groups(self.param_groups)

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether a step with an infinite or NaN gradient leaves the weights unchanged."""
        return False

    @property
    def skipped_steps(self) -> Tensor:
        """Number of updates skipped for a non-finite gradient: int64 scalar; 0 if the class never skips."""
        return torch.zeros((), dtype=torch.int64, device="cpu")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, which may set options of this optimizer and of the base optimizer.

        Raises:
            ValueError: an option is invalid. Nothing was changed.
        """
        self._check_group(param_group)
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict, whose groups include this optimizer's options."""
        return state_dicts.save(self, self._pack)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of :meth:`state_dict`. Options missing in it keep their current values.

        Raises:
            ValueError: an option of a group is invalid. Nothing was changed.
        """
        state_dicts.load(self, self._unpack, state_dict)

    def _pack(self) -> dict[str, Any]:
        self.options.complete(self.base_optimizer.param_groups)
        return self.base_optimizer.state_dict()

    def _unpack(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            self._check_group(group)
        self.options.complete(self.base_optimizer.param_groups)
        self.base_optimizer.load_state_dict(state_dict)
        self.options.complete(self.base_optimizer.param_groups)

    def _all_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _is_blank(self) -> bool:
        """Return whether a step would only create state.

        torch.distributed.checkpoint initializes an optimizer by one step with zero gradients and lr=0.
        """
        if self.state or not all(_is_zero(group.get("lr", 0.0)) for group in self.param_groups):
            return False
        parameters = self._all_parameters()
        present = [local_part(p.grad) for p in parameters if p.grad is not None]
        found = max((1 + bool(gradient.any()) for gradient in present), default=0)
        # One rank's shards may be empty or 0 where those of others are not.
        return sharding.largest(found, parameters) == 1

    def __getstate__(self) -> dict[str, Any]:
        self.options.complete(self.base_optimizer.param_groups)
        # Copies do not inherit hooks, as in torch.optim, nor the step() that a scheduler has set on this
        # instance, which would step the original.
        return {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name != "step"
        }


def _is_zero(lr: float | Tensor) -> bool:
    """Return whether a learning rate is 0; False for a device tensor, which the host would wait for."""
    return not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0
