"""Methods, named ``loss[-rule]``: which loss, and how rare classes are favored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastsam.longtail.classes import ClassWeightSettings
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import LOSSES
from fastsam.longtail.registry import Registry, RunPart, load_plugins
from fastsam.longtail.settings import DeferralSettings, Entry, NoSettings, Settings, setting

Sampling = Literal["class-balanced", "square-root", "progressive"]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Settings):
    """The setting of a rule that re-samples classes."""

    sampling: Sampling = setting(
        "how classes are re-sampled: class-balanced; square-root (of the count); progressive "
        "(from the counts to class-balanced over the run)",
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
    ("none", NoSettings, "every image counts once"),
    ("rw", ClassWeightSettings, "re-weight the loss by class"),
    ("drw", DeferredWeightSettings, "re-weight from the deferral epoch on"),
    ("rs", SamplingSettings, "re-sample: draw rare classes more often"),
    ("drs", DeferredSamplingSettings, "re-sample from the deferral epoch on"),
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
        """Read ``loss`` or ``loss-rule``; the last word is a rule only if a rule has this name.

        Raises:
            UsageError: naming the valid losses and rules.

        Example:
            >>> Method.parse("ldam-drw")
            Method(loss='ldam', rule='drw')
        """
        loss, dash, rule = name.rpartition("-")
        if not dash or rule not in tuple(RULES):
            loss, rule = name, "none"
        if loss not in LOSSES:
            failed = "".join(f"; plug-in {key}: {why}" for key, why in load_plugins().items())
            raise UsageError(
                f"unknown method {name!r}; a method is loss or loss-rule, with loss one of "
                f"{', '.join(LOSSES.names())} and rule one of {', '.join(RULES)}{failed}"
            )
        method = cls(loss, rule)
        if method.weighted and LOSSES[loss].balances_classes:
            raise UsageError(f"{name}: the loss {loss} balances classes by itself")
        return method

    @property
    def name(self) -> str:
        """The method as it is written on the command line."""
        return self.loss if self.rule == "none" else f"{self.loss}-{self.rule}"

    @property
    def weighted(self) -> bool:
        """Whether class weights enter the loss at some time."""
        return issubclass(RULES[self.rule].settings, ClassWeightSettings)

    @property
    def resampled(self) -> bool:
        """Whether classes are re-sampled at some time."""
        return issubclass(RULES[self.rule].settings, SamplingSettings)

    @property
    def deferred(self) -> bool:
        """Whether the rule takes effect after the deferral epoch only."""
        return issubclass(RULES[self.rule].settings, DeferralSettings)
