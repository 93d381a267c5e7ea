"""Registry of stage lists: trainings in several stages, each of which starts from an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.registry import Registry, ValuesPart
from fastsam.longtail.settings import Entry, Layer, Settings, factor_text, matching, setting

BASE = "base"
"""Value of the setting ``optimizer`` in a stage: the base optimizer of the first stage, without ascents."""
_OF_OPTIMIZER = ("lr", "weight_decay", "nesterov")
"""Settings whose values hold for one base optimizer only."""
OWN = "own:"
"""Prefix of lists that a file or a program defines."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of training.

    Its settings are those of the run, except for the values below. Settings of losses, heads and other parts
    that only the stage has come from the recipe.

    Attributes:
        name: name of the stage in the list.
        settings: values of settings with their sources.
        exact: values that replace them, by patterns of the data set and its imbalance factor, such as
            ``("cifar100-lt", "50")`` or ``("places-lt", "*")``. Later entries override earlier ones.
        start: name of the earlier stage from whose weights it starts; None for the stage before it.
    """

    name: str
    settings: Layer = field(default_factory=dict)
    exact: Mapping[tuple[str, str], Layer] = field(default_factory=dict)
    start: str | None = None

    def values(self, data: str, imbalance: float | None) -> dict[str, Entry]:
        """Return the value of each setting for a data set, by name.

        Args:
            data: name of the data set.
            imbalance: its imbalance factor; None if it has none.
        """
        return {**self.settings, **matching(self.exact, data, factor_text(imbalance))}


@dataclass(frozen=True, kw_only=True)
class StageSettings(Settings):
    """Setting of runs in stages."""

    stage_set: tuple[str, ...] = setting(
        "settings of single stages, as STAGE.SETTING=VALUE, such as classifier.lr=0.05. Spaces separate the "
        "values of a setting with several: 'classifier.lr_milestones=10 20'",
        default=(),
        default_text="those of the list",
        before=(),
    )


@dataclass(frozen=True, kw_only=True)
class StageList(ValuesPart):
    """A list of stages. Once it is registered, ``--stages NAME`` trains it.

    The first stage has the settings of the run; what it sets itself gives way to values that the user passes.

    Attributes:
        stages: the stages, in the order in which they are trained; empty for a run without stages.
        base: base optimizer to which its learning rates, weight decays and Nesterov momenta belong. With
            another one, the recipe sets these, except in a stage that sets its optimizer itself. None if they
            hold for every optimizer.
        needs_weights: whether the network must have start weights, such as pretrained ones.

    Raises:
        UsageError: if a stage has no name or a name of another one, starts from a stage that is not before
            it, or the first stage sets ``data``, ``method`` or ``optimizer``.
    """

    stages: Sequence[Stage] = ()
    base: str | None = "sgd"
    needs_weights: bool = False
    settings: type[Settings] = StageSettings

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        for layer in [stage.settings for stage in self.stages[:1]]:
            for name in layer.keys() & {"data", "method", "optimizer"}:
                raise UsageError(
                    f"stage {names[0]!r} of {self.name} sets {name}, but the first stage has the {name} of "
                    "the run; set it there"
                )
        for place, stage in enumerate(self.stages):
            where = f"stage {stage.name!r} of {self.name}"
            if not stage.name or not stage.name.replace("-", "_").isidentifier():
                raise UsageError(
                    f"{where}: the name must be of letters, digits and '-', such as classifier"
                )
            if stage.name in names[:place]:
                raise UsageError(f"{where}: two stages have this name; rename one of them")
            if stage.start is None:
                continue
            if stage.start in names[place:]:
                raise UsageError(
                    f"{where} starts from {stage.start!r}, which is not trained before it; move that stage "
                    "up, or omit start to continue the stage before"
                )
            if stage.start not in names:
                raise UsageError(f"{where}: {unknown('stage', stage.start, names)}")

    def values(
        self, stage: Stage, data: str, imbalance: float | None, base: str | None
    ) -> dict[str, Entry]:
        """Return the values of a stage for a data set and a base optimizer, by setting.

        Args:
            stage: one of the stages.
            data: name of the data set.
            imbalance: its imbalance factor; None if it has none.
            base: base optimizer of the stage; None for SGD.
        """
        found = stage.values(data, imbalance)
        chosen = found["optimizer"].value if "optimizer" in found else BASE
        own = chosen != BASE or "base_optimizer" in found
        if own or self.base in (None, base or "sgd"):
            return found
        return {name: entry for name, entry in found.items() if name not in _OF_OPTIMIZER}

    def first(self, data: str, imbalance: float | None, base: str | None) -> dict[str, Entry]:
        """Return what the first stage contributes to the recipe of the run; see :meth:`values`."""
        return self.values(self.stages[0], data, imbalance, base) if self.stages else {}


STAGES: Registry[StageList] = Registry("stages", "fastsam.longtail.stages")
register_stages = STAGES.add
# The list itself is only needed to train, so that trained runs can be read without it.
STAGES.add_family(
    OWN,
    lambda name: StageList(name=name, module=__name__, summary="a list from a file or a program"),
    listed=False,
)
