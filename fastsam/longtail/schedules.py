"""Schedules of learning rate and rho. They are functions of the epoch, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastsam.longtail.errors import UsageError
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.settings import NoSettings, Settings, check_rising, setting
from fastsam.optim import CosineAnnealing, LinearSchedule, Schedule, StepSchedule


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule(RunPart):
    """A learning-rate schedule after warm-up.

    Attributes:
        build: ``build(settings, run)`` creates a :class:`fastsam.optim.Schedule`.
    """

    build: Callable[[Any, Mapping[str, Any]], Schedule]


LR_SCHEDULES: Registry[LearningRateSchedule] = Registry("lr_schedule")


@dataclass(frozen=True, kw_only=True)
class MultistepSettings(Settings):
    """Settings of a learning rate that drops at milestones."""

    lr_milestones: tuple[int, ...] = setting(
        "epochs after which a multistep schedule changes the learning rate", low=1, scaled=0
    )
    lr_factors: tuple[float, ...] = setting(
        "learning rate after each milestone, as a factor on --lr", low=0
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that milestones increase and that there is a factor for each."""
        super().check(run)
        check_rising("lr_milestones", self.lr_milestones, run["epochs"])
        if len(self.lr_milestones) != len(self.lr_factors):
            raise UsageError(
                f"lr_factors must have one value for each of the {len(self.lr_milestones)} lr_milestones, "
                f"got {len(self.lr_factors)}"
            )


@dataclass(frozen=True, kw_only=True)
class CosineSettings(Settings):
    """Settings of a cosine learning-rate schedule."""

    cosine_start: Literal["first-epoch", "after-warmup"] = setting(
        "start of a cosine schedule: first-epoch (warm-up overrides its first epochs) or after-warmup",
        default="first-epoch",
        before="first-epoch",
    )


def _multistep(settings: MultistepSettings, run: Mapping[str, Any]) -> Schedule:
    """Create a schedule whose factors are relative to ``lr``, not to each other."""
    factors = (1.0, *settings.lr_factors)
    return StepSchedule(settings.lr_milestones, [run["lr"] * factor for factor in factors])


def _cosine(settings: CosineSettings, run: Mapping[str, Any]) -> Schedule:
    warmup = run["warmup_epochs"] if settings.cosine_start == "after-warmup" else None
    return CosineAnnealing(run["lr"], run["epochs"], warmup)


LR_SCHEDULES.add(
    LearningRateSchedule(
        name="multistep",
        summary="lr multiplied by the factor of each phase",
        build=_multistep,
        settings=MultistepSettings,
    )
)
LR_SCHEDULES.add(
    LearningRateSchedule(
        name="cosine",
        summary="half a cosine, without restarts",
        build=_cosine,
        settings=CosineSettings,
    )
)


@dataclass(frozen=True, kw_only=True)
class RhoSchedule(RunPart):
    """A schedule of rho.

    Attributes:
        build: ``build(settings, rho, run)`` creates a :class:`fastsam.optim.Schedule`.
        phases: ``phases(settings)`` returns the number of rho values that it needs.
    """

    build: Callable[..., Schedule]
    phases: Callable[[Any], int] = lambda settings: 1


RHO_SCHEDULES: Registry[RhoSchedule] = Registry("rho_schedule")


@dataclass(frozen=True, kw_only=True)
class SteppedRhoSettings(Settings):
    """Settings of a rho that changes at milestones."""

    rho_milestones: tuple[int, ...] = setting(
        "epochs after which a stepped rho changes to its next value", low=1, scaled=0
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that milestones increase and lie within the run."""
        super().check(run)
        check_rising("rho_milestones", self.rho_milestones, run["epochs"])


@dataclass(frozen=True, kw_only=True)
class DeferredRhoSettings(Settings):
    """Settings of a rho that changes at the deferral epoch of the method; there are none."""

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that the method has a deferral epoch."""
        super().check(run)
        if run.get("defer_epoch") is None:
            raise UsageError(
                f"rho_schedule 'deferred' requires a method with a deferral epoch, got {run['method']!r}; "
                "choose a method with rule drw or drs"
            )


for _schedule in (
    RhoSchedule(
        name="constant",
        summary="one value of rho",
        build=lambda settings, rho, run: StepSchedule((), rho),
        settings=NoSettings,
    ),
    RhoSchedule(
        name="step",
        summary="one value of rho per phase between rho_milestones",
        build=lambda settings, rho, run: StepSchedule(settings.rho_milestones, rho),
        settings=SteppedRhoSettings,
        phases=lambda settings: len(settings.rho_milestones) + 1,
    ),
    RhoSchedule(
        name="linear",
        summary="from the first value of rho to the second over the run",
        build=lambda settings, rho, run: LinearSchedule(rho[0], rho[1], run["epochs"]),
        phases=lambda settings: 2,
    ),
    RhoSchedule(
        name="deferred",
        summary="second value of rho after defer_epoch, as in Algorithm 1 of Rangwani et al. 2022",
        build=lambda settings, rho, run: StepSchedule((run["defer_epoch"],), rho),
        settings=DeferredRhoSettings,
        phases=lambda settings: 2,
    ),
):
    RHO_SCHEDULES.add(_schedule)
