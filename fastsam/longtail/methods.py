"""Methods ``LOSS[-RULE]``: a loss, and a rule that re-weights or re-samples classes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from fastsam.longtail.classes import ClassWeightSettings
from fastsam.longtail.errors import UsageError, suggestion
from fastsam.longtail.losses.base import LOSSES
from fastsam.longtail.registry import Registry, RunPart, load_plugins
from fastsam.longtail.settings import DeferralSettings, Entry, NoSettings, Settings, setting

Sampling = Literal["class-balanced", "square-root", "progressive", "class-aware"]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """Setting of rules that re-sample classes."""

    sampling: Sampling = setting(
        "sampling probability of classes: class-balanced (equal), square-root (proportional to the square "
        "root of the count), progressive (proportional to the count at first, equal at the end of the run) "
        "or class-aware (equal counts: cycles over shuffled classes with 4 images of each)",
        default=Entry("class-balanced", "Cao et al. 2019 (baselines RS and DRS)"),
    )


@dataclass(frozen=True, kw_only=True)
class DeferredWeightSettings(ClassWeightSettings, DeferralSettings):
    """Settings of ``drw``."""


@dataclass(frozen=True, kw_only=True)
class DeferredSamplingSettings(SamplingSettings, DeferralSettings):
    """Settings of ``drs``."""


RULES: Registry[RunPart] = Registry("rule")
for _name, _settings, _summary in (
    ("none", NoSettings, "no re-weighting and no re-sampling"),
    ("rw", ClassWeightSettings, "re-weight the loss by class"),
    ("drw", DeferredWeightSettings, "re-weight the loss by class after the deferral epoch"),
    ("rs", SamplingSettings, "re-sample rare classes more often"),
    ("drs", DeferredSamplingSettings, "re-sample rare classes more often after the deferral epoch"),
):
    RULES.add(RunPart(name=_name, summary=_summary, build=_settings, settings=_settings))


@dataclass(frozen=True)
class Method:
    """A loss and a rule.

    Attributes:
        loss: one of :data:`LOSSES`.
        rule: one of :data:`RULES`.
    """

    loss: str
    rule: str = "none"

    @classmethod
    def parse(cls, name: str) -> Method:
        """Parse ``LOSS`` or ``LOSS-RULE``. The last word counts as a rule only if a rule has this name.

        Raises:
            UsageError: if the loss is unknown, or loss and rule balance classes twice. The message suggests
                the closest method and lists the valid losses and rules.

        Example:
            >>> Method.parse("ldam-drw")
            Method(loss='ldam', rule='drw')
        """
        loss, dash, rule = name.rpartition("-")
        if not dash or rule not in tuple(RULES):
            loss, rule = name, "none"
        if loss not in LOSSES:
            failed = "".join(f"; plug-in {key}: {why}" for key, why in load_plugins().items())
            methods = (cls(*pair) for pair in product(LOSSES, RULES))
            hint = suggestion(name, [one.name for one in methods if not one.balances_twice])
            raise UsageError(
                f"unknown method {name!r}{hint or ';'} expected LOSS or LOSS-RULE, where LOSS is one of "
                f"{', '.join(LOSSES.names())} and RULE is one of {', '.join(RULES)}{failed}"
            )
        method = cls(loss, rule)
        if method.balances_twice:
            raise UsageError(
                f"method {name!r} balances classes twice, in the loss and by the rule; choose {loss!r}"
            )
        return method

    @property
    def name(self) -> str:
        """The method as it is written on the command line."""
        return self.loss if self.rule == "none" else f"{self.loss}-{self.rule}"

    @property
    def weighted(self) -> bool:
        """Whether the loss has class weights in some epochs."""
        return issubclass(RULES[self.rule].settings, ClassWeightSettings)

    @property
    def balances_twice(self) -> bool:
        """Whether the loss balances classes by itself and has class weights in addition."""
        return self.weighted and LOSSES[self.loss].balances_classes

    @property
    def resampled(self) -> bool:
        """Whether classes are re-sampled in some epochs."""
        return issubclass(RULES[self.rule].settings, SamplingSettings)

    @property
    def deferred(self) -> bool:
        """Whether the rule takes effect only after the deferral epoch."""
        return issubclass(RULES[self.rule].settings, DeferralSettings)
