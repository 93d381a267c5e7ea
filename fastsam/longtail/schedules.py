"""Learning rate and rho of an epoch, in closed form, so that a resumed run needs no state."""

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
    """A schedule after warm-up; ``build(settings, run)`` makes a :class:`fastsam.optim.Schedule`."""

    build: Callable[[Any, Mapping[str, Any]], Schedule]


LR_SCHEDULES: Registry[LearningRateSchedule] = Registry("lr_schedule")


@dataclass(frozen=True, kw_only=True)
class MultistepSettings(Settings):
    """Settings of a learning rate that drops at milestones."""

    lr_milestones: tuple[int, ...] = setting(
        "last epoch of each phase of a multistep schedule", low=1, scaled=0
    )
    lr_factors: tuple[float, ...] = setting("factor on lr after each milestone", low=0)

    def check(self, run: Mapping[str, Any]) -> None:
        """There is a factor for every milestone."""
        super().check(run)
        check_rising("lr_milestones", self.lr_milestones, run["epochs"])
        if len(self.lr_milestones) != len(self.lr_factors):
            raise UsageError(
                f"lr_factors needs one value per milestone: {len(self.lr_milestones)} expected, "
                f"got {len(self.lr_factors)}"
            )


@dataclass(frozen=True, kw_only=True)
class CosineSettings(Settings):
    """Settings of a learning rate that falls along a cosine."""

    cosine_start: Literal["first-epoch", "after-warmup"] = setting(
        "where a cosine schedule begins: at the first-epoch, of which warm-up replaces a part, "
        "or after-warmup",
        default="first-epoch",
        before="first-epoch",
    )


def _multistep(settings: MultistepSettings, run: Mapping[str, Any]) -> Schedule:
    """Factors are relative to lr, not to one another."""
    factors = (1.0, *settings.lr_factors)
    return StepSchedule(settings.lr_milestones, [run["lr"] * factor for factor in factors])


def _cosine(settings: CosineSettings, run: Mapping[str, Any]) -> Schedule:
    warmup = run["warmup_epochs"] if settings.cosine_start == "after-warmup" else None
    return CosineAnnealing(run["lr"], run["epochs"], warmup)


LR_SCHEDULES.add(
    LearningRateSchedule(
        name="multistep",
        summary="lr times the factor of each phase",
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
    """A schedule of rho; ``build(settings, rho, run)`` makes a :class:`fastsam.optim.Schedule`.

    Attributes:
        phases: how many values of rho it needs, given its settings.
    """

    build: Callable[..., Schedule]
    phases: Callable[[Any], int] = lambda settings: 1


RHO_SCHEDULES: Registry[RhoSchedule] = Registry("rho_schedule")


@dataclass(frozen=True, kw_only=True)
class SteppedRhoSettings(Settings):
    """Settings of a rho that changes at milestones."""

    rho_milestones: tuple[int, ...] = setting(
        "last epoch of each phase of a stepped rho", low=1, scaled=0
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Milestones rise and lie within the run."""
        super().check(run)
        check_rising("rho_milestones", self.rho_milestones, run["epochs"])


@dataclass(frozen=True, kw_only=True)
class DeferredRhoSettings(Settings):
    """Settings of a rho that changes at the deferral epoch of the method: none of its own."""

    def check(self, run: Mapping[str, Any]) -> None:
        """The method has a deferral epoch."""
        super().check(run)
        if run.get("defer_epoch") is None:
            raise UsageError(
                "rho_schedule deferred needs a method with a deferral epoch (drw, drs)"
            )


for _schedule in (
    RhoSchedule(
        name="constant",
        summary="one value",
        build=lambda settings, rho, run: StepSchedule((), rho),
        settings=NoSettings,
    ),
    RhoSchedule(
        name="step",
        summary="one value per phase between rho_milestones",
        build=lambda settings, rho, run: StepSchedule(settings.rho_milestones, rho),
        settings=SteppedRhoSettings,
        phases=lambda settings: len(settings.rho_milestones) + 1,
    ),
    RhoSchedule(
        name="linear",
        summary="from the first value to the second",
        build=lambda settings, rho, run: LinearSchedule(rho[0], rho[1], run["epochs"]),
        phases=lambda settings: 2,
    ),
    RhoSchedule(
        name="deferred",
        summary="second value after defer_epoch, as in Algorithm 1 of Rangwani et al. 2022",
        build=lambda settings, rho, run: StepSchedule((run["defer_epoch"],), rho),
        settings=DeferredRhoSettings,
        phases=lambda settings: 2,
    ),
):
    RHO_SCHEDULES.add(_schedule)
