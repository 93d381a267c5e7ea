"""Registry of base optimizers: those that make the update of SAM and of every other optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.settings import Settings
from fastsam.optim import Schedule


@dataclass(frozen=True)
class OptimizerInputs:
    """Inputs from which an optimizer is built.

    Attributes:
        parameters: names and values of the trained parameters, or parameter groups of them. A group may have
            its own ``lr`` and ``weight_decay``.
        lr: learning rate after warm-up; the schedule sets the learning rate of each epoch.
        weight_decay: weight decay of parameters whose group has none.
        seed: seed of the optimizer's noise.
        run: all settings of the run by name.
        steps_per_epoch: optimizer steps per epoch.
        process_group: process group of the ranks; None for a single process.
    """

    parameters: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
    lr: float
    weight_decay: float
    seed: int
    run: Mapping[str, Any]
    steps_per_epoch: int
    process_group: ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """Base class of the settings of an optimizer."""

    def schedules(self, run: Mapping[str, Any]) -> dict[str, Schedule]:
        """Return the schedules of parameter-group options that change between epochs, besides ``lr``.

        Args:
            run: all settings of the run by name.
        """
        return {}

    def state_copies(self) -> int:
        """Return an upper estimate of the state tensors per parameter in the optimizer's state dict.

        The base optimizer's own state is counted with the base optimizer.
        """
        return 2


@dataclass(frozen=True, kw_only=True)
class BaseOptimizer(RunPart):
    """A base optimizer. Once it is registered, ``--base-optimizer NAME`` updates with it.

    Attributes:
        build: ``build(settings, inputs)`` creates the optimizer from :class:`OptimizerInputs`.
        shards: whether it can train parameters of which each rank holds a part (DTensors).
    """

    build: Callable[[Any, OptimizerInputs], Optimizer]
    settings: type[OptimizerSettings] = OptimizerSettings
    shards: bool = False


BASE_OPTIMIZERS: Registry[BaseOptimizer] = Registry(
    "base_optimizer", "fastsam.longtail.base_optimizers"
)
register_base_optimizer = BASE_OPTIMIZERS.add
