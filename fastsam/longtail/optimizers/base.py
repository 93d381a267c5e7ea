"""The optimizers by name, and the settings that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import SGD, Optimizer

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.schedules import RHO_SCHEDULES
from fastsam.longtail.settings import Entry, Settings, setting
from fastsam.optim import Schedule


@dataclass(frozen=True)
class OptimizerInputs:
    """What an optimizer is built for.

    Attributes:
        parameters: the trained parameters with their names.
        lr: learning rate after warm-up; the schedule sets it in every epoch.
        weight_decay: L2 penalty on every parameter.
        seed: seed of the optimizer's own noise.
        run: every setting of the run by name.
        steps_per_epoch: steps of an epoch.
        process_group: the processes of the run; None for one.
    """

    parameters: Iterable[tuple[str, Tensor]]
    lr: float
    weight_decay: float
    seed: int
    run: Mapping[str, Any]
    steps_per_epoch: int
    process_group: ProcessGroup | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """Base of the settings of an optimizer."""

    def schedules(self, run: Mapping[str, Any]) -> dict[str, Schedule]:
        """Options of the parameter groups that change from epoch to epoch, besides ``lr``.

        Args:
            run: every setting of the run by name.
        """
        return {}

    def state_copies(self) -> int:
        """Estimate how many tensors of a parameter's size the state dict holds for it."""
        return 2


@dataclass(frozen=True, kw_only=True)
class SGDSettings(OptimizerSettings):
    """Settings of SGD, on which every optimizer of the paper is built."""

    momentum: float = setting("momentum of SGD", default=Entry(0.9, "[code]"), low=0, high=1)
    nesterov: bool = setting("Nesterov momentum", default=Entry(False, "[code]"), before=False)

    def check(self, run: Mapping[str, Any]) -> None:
        """Nesterov momentum needs momentum."""
        super().check(run)
        if self.nesterov and self.momentum == 0:
            raise UsageError("nesterov needs a momentum above 0")

    def state_copies(self) -> int:
        """The momentum buffer."""
        return int(self.momentum > 0)

    def sgd(self, inputs: OptimizerInputs) -> SGD:
        """Make the base optimizer."""
        return SGD(
            inputs.parameters,
            lr=inputs.lr,
            momentum=self.momentum,
            weight_decay=inputs.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True, kw_only=True)
class AscentSettings(SGDSettings):
    """Settings of the optimizers that ascend: SAM and its relatives."""

    rho: tuple[float, ...] = setting(
        "radius of the ascent step: one value, or one per phase of the rho schedule",
        default=Entry((0.05,), "starting point; the paper names no value", known=False),
        low=0,
    )
    rho_schedule: str = setting(
        "constant; step (at rho_milestones); linear (first to last epoch); deferred (second "
        "value after defer_epoch, as Algorithm 1)",
        default=Entry("constant", "[code]"),
        names=RHO_SCHEDULES,
    )
    ascent_start: str = setting(
        "epoch before the first ascent: a number, 0 for ascents from the beginning; defer (the "
        "deferral epoch of the method, else drop); or drop (the first drop of the learning rate "
        "after warm-up). Earlier steps are those of SGD, with one pass",
        default="0",
        before="0",
    )
    ascent_stop: int | None = setting(
        "last epoch with ascents; by default the last of the run", optional=True, low=1
    )
    ascent_share: float = setting(
        "share of each batch whose gradient directs the ascent, sampled at random; the second pass reads "
        "the whole batch. Below 1, and with ascent_sample weighted, the training loss of such a step is "
        "that at the perturbed weights",
        default=1.0,
        before=1.0,
        above=0,
        high=1,
    )
    ascent_sample: Literal["uniform", "weighted"] = setting(
        "how that share is sampled: uniform, without replacement; weighted, with replacement in "
        "proportion to the class weights of the epoch, which the loss of the ascent then leaves out "
        "(rules rw and drw)",
        default="uniform",
        before="uniform",
    )
    ascent_scope: Literal["global", "local"] = setting(
        "gradient that directs the ascent of each process: global, of the batch of all processes; "
        "local, of the process's own part of the batch",
        default="global",
        before="global",
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """There is a rho for every phase of the schedule, some epoch has ascents, and weights exist."""
        super().check(run)
        first = self.first_ascent_epoch(run)
        last = run["epochs"] if self.ascent_stop is None else self.ascent_stop
        if last > run["epochs"]:
            raise UsageError(
                f"ascent_stop must be at most epochs ({run['epochs']}), got {last}; leave it out for ascents "
                "to the end"
            )
        if first > last:
            raise UsageError(
                f"no epoch would have ascents: with ascent_start {self.ascent_start} the first is {first}, "
                f"and the last is {last}; choose ascent_start below {last}"
            )
        schedule = RHO_SCHEDULES[self.rho_schedule]
        needed = schedule.phases(run["parts"]["rho_schedule"])
        if len(self.rho) != needed:
            raise UsageError(
                f"rho needs {needed} value(s) with rho_schedule {self.rho_schedule}, "
                f"got {len(self.rho)}; for a fixed radius choose rho_schedule constant"
            )
        if self.ascent_sample == "weighted" and run.get("weighting") is None:
            raise UsageError(
                f"ascent_sample weighted samples by class weights, and the method {run['method']} has none: "
                "choose a method with the rule rw or drw, such as ce-drw, or ascent_sample=uniform"
            )

    def first_ascent_epoch(self, run: Mapping[str, Any]) -> int:
        """The first epoch with ascents, counted from 1.

        Raises:
            UsageError: ``ascent_start`` is not valid, or the learning rate has no drop.
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
                f"ascent_start {self.ascent_start} needs a learning rate that drops after warm-up, but "
                f"lr_schedule is {run['lr_schedule']}; give the epoch, for instance "
                f"ascent_start={run['epochs'] * 4 // 5}"
            )
        return int(drops[0]) + 1

    def ascent(self, inputs: OptimizerInputs) -> dict[str, Any]:
        """The arguments of SAM that choose the steps with ascents and whose gradients direct them."""
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
        "steps from one ascent to the next, counted from the first; rho is not scaled",
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
    """An optimizer; once it is registered, ``--optimizer NAME`` trains with it.

    Attributes:
        build: ``build(settings, inputs)`` makes it, given :class:`OptimizerInputs`. One that needs
            several gradients a step has a method ``passes()``; see
            :func:`fastsam.optim.passes_of`.
    """

    build: Callable[[Any, OptimizerInputs], Optimizer]
    settings: type[OptimizerSettings] = OptimizerSettings


OPTIMIZERS: Registry[OptimizerPart] = Registry("optimizer", "fastsam.longtail.optimizers")
register_optimizer = OPTIMIZERS.add
