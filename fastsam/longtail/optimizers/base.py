"""Registry of optimizers, and the settings that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer

from fastsam.longtail.base_optimizers.base import (
    BASE_OPTIMIZERS,
    OptimizerInputs,
    OptimizerSettings,
)
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.schedules import RHO_SCHEDULES
from fastsam.longtail.settings import Entry, setting
from fastsam.optim import Schedule


@dataclass(frozen=True, kw_only=True)
class BasedSettings(OptimizerSettings):
    """Settings of an optimizer around a base optimizer."""

    base_optimizer: str = setting(
        "optimizer that makes the update with the gradient",
        default="sgd",
        before="sgd",
        names=BASE_OPTIMIZERS,
    )

    def state_copies(self) -> int:
        """Return 0: all state is that of the base optimizer."""
        return 0

    def base(self, inputs: OptimizerInputs) -> Optimizer:
        """Create the base optimizer."""
        part = BASE_OPTIMIZERS[self.base_optimizer]
        return part.build(inputs.run["parts"]["base_optimizer"], inputs)


@dataclass(frozen=True, kw_only=True)
class AscentSettings(BasedSettings):
    """Settings of optimizers with ascent steps: SAM and its variants."""

    rho: tuple[float, ...] = setting(
        "radius rho of the ascent step: one value, or one for each phase of rho_schedule",
        default=Entry((0.05,), "starting point; the paper names no value", known=False),
        low=0,
    )
    rho_schedule: str = setting(
        "schedule of rho: constant; step (next value after each of rho_milestones); linear (from the first "
        "value to the second over the run); or deferred (second value after defer_epoch, as in "
        "Algorithm 1 of Rangwani et al. 2022)",
        default=Entry("constant", "[code]"),
        names=RHO_SCHEDULES,
    )
    ascent_start: str = setting(
        "epoch after which ascents begin: a number (0: from the start); drop (the epoch before the learning "
        "rate first drops after warm-up); or defer (the deferral epoch; if the method has none, the same as "
        "drop). Steps without an ascent are steps of the base optimizer with one pass",
        default="0",
        before="0",
    )
    ascent_stop: int | None = setting(
        "last epoch with ascents", optional=True, low=1, default_text="last epoch of the run"
    )
    ascent_share: float = setting(
        "share of each batch from which the ascent gradient is computed, sampled at random; the second "
        "pass uses the whole batch. If ascent_share is below 1 or ascent_sample is weighted, the recorded "
        "training loss of a step with an ascent is the loss at the perturbed weights",
        default=1.0,
        before=1.0,
        above=0,
        high=1,
    )
    ascent_sample: Literal["uniform", "weighted"] = setting(
        "how the images of ascent_share are sampled: uniform (without replacement) or weighted (with "
        "replacement and in proportion to the class weights of the epoch; the ascent loss is then "
        "unweighted; requires rule rw or drw)",
        default="uniform",
        before="uniform",
    )
    ascent_scope: Literal["global", "local"] = setting(
        "gradient of the ascent step in distributed training: global (of the batch over all ranks) or "
        "local (of each rank's part of the batch)",
        default="global",
        before="global",
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check the number of rho values, the epochs with ascents, and that weights exist to sample by."""
        super().check(run)
        first = self.first_ascent_epoch(run)
        last = run["epochs"] if self.ascent_stop is None else self.ascent_stop
        if last > run["epochs"]:
            raise UsageError(
                f"ascent_stop must be at most epochs ({run['epochs']}), got {last}; omit it to ascend up to "
                "the last epoch"
            )
        if first > last:
            raise UsageError(
                f"no epoch would have ascent steps: ascent_start={self.ascent_start} makes {first} the first "
                f"and {last} is the last; choose ascent_start below {last}"
            )
        schedule = RHO_SCHEDULES[self.rho_schedule]
        needed = schedule.phases(run["parts"]["rho_schedule"])
        if len(self.rho) != needed:
            raise UsageError(
                f"rho must have {needed} value(s) for rho_schedule {self.rho_schedule}, "
                f"got {len(self.rho)}; for a fixed radius choose rho_schedule=constant"
            )
        if self.ascent_sample == "weighted" and run.get("weighting") is None:
            raise UsageError(
                f"ascent_sample 'weighted' requires class weights, but method {run['method']} has none; "
                "choose a method with rule rw or drw, such as ce-drw, or ascent_sample=uniform"
            )

    def first_ascent_epoch(self, run: Mapping[str, Any]) -> int:
        """Return the first epoch with ascent steps, counted from 1.

        Raises:
            UsageError: if ``ascent_start`` is not valid, or it refers to a drop of the learning rate and
                there is none.
        """
        if self.ascent_start.isdecimal():
            return int(self.ascent_start) + 1
        if self.ascent_start not in ("defer", "drop"):
            raise unknown("ascent_start", self.ascent_start, ("an epoch", "defer", "drop"))
        if self.ascent_start == "defer" and run.get("defer_epoch") is not None:
            return int(run["defer_epoch"]) + 1
        drops = [m for m in run.get("lr_milestones") or () if m >= run["warmup_epochs"]]
        if not drops:
            raise UsageError(
                f"ascent_start {self.ascent_start} requires a learning rate that drops after warm-up, but "
                f"lr_schedule is {run['lr_schedule']}; pass an epoch instead, for instance "
                f"ascent_start={run['epochs'] * 4 // 5}"
            )
        return int(drops[0]) + 1

    def ascent(self, inputs: OptimizerInputs) -> dict[str, Any]:
        """Return the arguments of SAM that select the steps with ascents and the ascent gradient."""
        start = (self.first_ascent_epoch(inputs.run) - 1) * inputs.steps_per_epoch
        stop = None if self.ascent_stop is None else self.ascent_stop * inputs.steps_per_epoch
        ranks = inputs.process_group if self.ascent_scope == "local" else None
        return {"start": start, "stop": stop, "process_group": ranks}

    def schedules(self, run: Mapping[str, Any]) -> dict[str, Schedule]:
        """See :meth:`OptimizerSettings.schedules`."""
        schedule = RHO_SCHEDULES[self.rho_schedule]
        return {"rho": schedule.build(run["parts"]["rho_schedule"], self.rho, run)}


@dataclass(frozen=True, kw_only=True)
class SAMSettings(AscentSettings):
    """Settings of SAM and ASAM."""

    ascent_interval: int = setting(
        "ascend in every N-th step, counted from the first ascent. rho is not increased to make up for the "
        "steps without an ascent",
        default=1,
        before=1,
        low=1,
        high=10**9,
    )

    def ascent(self, inputs: OptimizerInputs) -> dict[str, Any]:
        """See :meth:`AscentSettings.ascent`."""
        return {**super().ascent(inputs), "interval": self.ascent_interval}


@dataclass(frozen=True, kw_only=True)
class OptimizerPart(RunPart):
    """An optimizer. Once it is registered, ``--optimizer NAME`` trains with it.

    Attributes:
        build: ``build(settings, inputs)`` creates the optimizer from :class:`OptimizerInputs`. An optimizer
            that needs several gradients per step must have a method ``passes()``; see
            :func:`fastsam.optim.passes_of`.
        base: name of the base optimizer whose state it has; None if the setting ``base_optimizer`` names it
            or there is none. A branch with another optimizer of the same base takes the state over.
        state: names of the state tensors that it adds to those of its base optimizer. A branch with another
            optimizer does not take them over.
        shards: whether it can train parameters of which each rank holds a part (DTensors).
    """

    build: Callable[[Any, OptimizerInputs], Optimizer]
    settings: type[OptimizerSettings] = OptimizerSettings
    base: str | None = None
    state: tuple[str, ...] = ()
    shards: bool = False


OPTIMIZERS: Registry[OptimizerPart] = Registry("optimizer", "fastsam.longtail.optimizers")
register_optimizer = OPTIMIZERS.add


def base_of(settings: Any) -> str | None:
    """Return the name of the base optimizer of a run; None if its optimizer has none.

    Args:
        settings: the settings of the run, a :class:`~fastsam.longtail.config.TrainConfig`.
    """
    name: str | None = settings.base_optimizer or OPTIMIZERS[settings.optimizer].base
    return name
