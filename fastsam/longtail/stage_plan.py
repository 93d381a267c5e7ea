"""The plan of a run: its stages with their settings. A run without stages has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from fastsam.longtail.config import TrainConfig, check_applies, chosen_parts, find_setting
from fastsam.longtail.config import applies as applies_to
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.models import HEADS
from fastsam.longtail.optimizers.base import OPTIMIZERS, base_of
from fastsam.longtail.recipes import NAMES, inherited_recipe, inherited_settings, rescaled
from fastsam.longtail.run_file import of_type, parse_setting
from fastsam.longtail.settings import Entry, settings_of
from fastsam.longtail.stages import BASE, STAGES, Stage, StageList
from fastsam.longtail.stages.base import OWN

_LABELS = ("stages", "stage_set")
_BEGINS = ("init", "head_from")
"""Settings of the first weights, which a later stage does not take over."""
_SHARED = ("data", "model", "seed", "init", *_LABELS)
"""Settings that all stages have in common, besides those of data set, network, machine and checkpoints."""
_MEASURED = ("track_curvature", "curvature_classes", "curvature_images", "curvature_budget")
"""Settings of what is measured, which do not change the training but may differ between stages."""
_RATES = ("lr", "weight_decay")
"""Settings that a stage with another base optimizer does not take over."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a planned run.

    Attributes:
        name: name of the stage; empty for a run without stages.
        config: its settings.
        sources: source of each setting, by name.
        start: place in the plan of the stage whose weights it starts from; None for the first.
        folder: its folder, relative to that of the run: ``stage-K``, or empty for the last stage.
    """

    name: str
    config: TrainConfig
    sources: Mapping[str, str]
    start: int | None
    folder: str

    def path(self, out: str | Path) -> Path:
        """Return the folder of the stage in the folder of the run."""
        return Path(out) / self.folder if self.folder else Path(out)


def plan_stages(
    config: TrainConfig, sources: Mapping[str, str] | None = None
) -> tuple[PlannedStage, ...]:
    """Return the stages of a run with their settings.

    The first stage has the settings of the run. Each later one has them, too, except for what its list sets,
    what only the first stage has from the list, and epochs in schedules, which the recipe scales to the
    number of epochs of the stage. ``stage_set`` overrides all of them.

    Args:
        config: settings of the run.
        sources: source of each setting, by name.

    Raises:
        UsageError: if a setting of a stage is unknown, does not belong to it or is not valid; if
            ``stage_set`` names no stage of the list; or if a stage cannot take over the head of the one that
            it starts from.

    Example:
        >>> from fastsam.longtail import recipe
        >>> config = recipe("digits-lt", "ce", "sam", stages="crt").config()
        >>> for stage in plan_stages(config):
        ...     print(stage.name, stage.config.method, stage.config.optimizer, stage.config.epochs)
        representation ce sam 100
        classifier ce-rs sgd 10
    """
    sources = sources or {}
    if config.stages == "none":
        return (PlannedStage("", config, sources, None, ""),)
    part = STAGES[config.stages]
    if not part.stages:
        raise UsageError(
            f"the stages of {config.stages} are unknown here; pass the --config file that lists them, or "
            "register the list with fastsam.longtail.stages.register_stages"
        )
    return tuple(_planned(part, config, sources, _set_by_name(config, part)))


def last_config(config: TrainConfig) -> TrainConfig:
    """Return the settings of the last stage of a run: those of its result."""
    return plan_stages(config)[-1].config


def stages_from(name: str, found: Any) -> StageList:
    """Create a list of stages from plain values, as a file contains it.

    Args:
        name: where the list was found, for messages.
        found: a list of mappings with the key ``name``, optionally ``start``, and names of settings.

    Raises:
        UsageError: if the list is empty, an entry is not such a mapping, a setting is unknown or has a wrong
            type, or a stage starts from one that is not before it.
    """
    if not isinstance(found, list) or not found or not all(isinstance(x, dict) for x in found):
        raise UsageError(
            f"{name}: stages must be the name of a list, or a list of stages such as "
            f"`- {{name: classifier, epochs: 10}}`, got {found!r:.60}"
        )
    stages = []
    for place, entry in enumerate(found, 1):
        values = {str(key).replace("-", "_"): value for key, value in entry.items()}
        title, start = values.pop("name", None), values.pop("start", None)
        if not isinstance(title, str) or not isinstance(start, str | None):
            raise UsageError(
                f"{name}: stage {place} needs a name, and start must name a stage if there is one, got "
                f"name {title!r:.40} and start {start!r:.40}"
            )
        settings = {}
        for key, value in values.items():
            try:
                plain = tuple(value) if isinstance(value, list) else value
                settings[key] = Entry(of_type(key, plain), name)
            except UsageError as error:
                raise UsageError(f"{name}: stage {title!r}: {error}") from error
        stages.append(Stage(name=title, settings=settings, start=start))
    label = OWN + "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).stem)
    try:
        summary = f"the stages in {name}"
        return StageList(
            name=label, module=__name__, summary=summary, stages=tuple(stages), base=None
        )
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


def stages_as_list(part: StageList) -> list[dict[str, Any]]:
    """Convert a list without values for single data sets to the plain values of :func:`stages_from`."""
    return [
        {
            "name": stage.name,
            **({} if stage.start is None else {"start": stage.start}),
            **{
                name: list(entry.value) if isinstance(entry.value, tuple) else entry.value
                for name, entry in stage.settings.items()
            },
        }
        for stage in part.stages
    ]


def _planned(
    part: StageList,
    config: TrainConfig,
    sources: Mapping[str, str],
    given: Mapping[str, Mapping[str, Entry]],
) -> Iterator[PlannedStage]:
    names = [stage.name for stage in part.stages]
    done: list[PlannedStage] = []
    for place, stage in enumerate(part.stages):
        own = given.get(stage.name, {})
        try:
            if place == 0:
                made = _with(config, sources, own) if own else (config, dict(sources))
            else:
                made = _derived(part, stage, config, sources, own)
            start = None if place == 0 else place - 1
            if stage.start is not None:
                start = names.index(stage.start)
            if start is not None:
                _check_head(made[0], done[start])
        except UsageError as error:
            raise UsageError(
                f"stage {stage.name} of {part.name.removeprefix(OWN)}: {error}"
            ) from error
        last = place == len(names) - 1
        # Only the result of the whole run is one of the list; an earlier stage is a run by itself.
        labels = {name: getattr(config, name) for name in _LABELS} if last else {"stages": "none"}
        kept = {**made[0].flat(), **dict.fromkeys(_LABELS), **labels}
        done.append(
            PlannedStage(
                stage.name,
                TrainConfig.create(**kept),
                {name: source for name, source in made[1].items() if name not in _LABELS},
                start,
                "" if last else f"stage-{place + 1}",
            )
        )
        yield done[-1]


def _with(
    config: TrainConfig, sources: Mapping[str, str], own: Mapping[str, Entry]
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the settings of the first stage with those of ``stage_set``."""
    _check_shared(config, own)
    names = {name: own[name].value if name in own else getattr(config, name) for name in NAMES}
    rest = {**inherited_settings(config), "stages": config.stages}
    left_out = _scheduled(config) if "epochs" in own else set()
    if _base(names["optimizer"], own, config) != base_of(config):
        left_out |= {*_RATES}
    rest = {name: value for name, value in rest.items() if name not in left_out}
    overrides = {name: entry.value for name, entry in own.items() if name not in NAMES}
    made = inherited_recipe(names, rest, overrides)
    return made.config(), _sources(made.sources, sources, rest, own)


def _derived(
    part: StageList,
    stage: Stage,
    config: TrainConfig,
    sources: Mapping[str, str],
    own: Mapping[str, Entry],
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the settings of a later stage.

    Args:
        part: the list.
        stage: the stage.
        config: settings of the run.
        sources: their sources.
        own: values of ``stage_set``, which must all belong to the stage.
    """
    place = config.data, config.imbalance
    before = base_of(config)
    stated = {**stage.values(*place), **own}
    names = {
        name: stated[name].value if name in stated else getattr(config, name) for name in NAMES
    }
    if names["optimizer"] == BASE:
        names["optimizer"] = before or config.optimizer
    base = _base(names["optimizer"], stated, config)
    listed = part.values(stage, *place, base)
    if "epochs" in own and "epochs" in listed:
        listed |= rescaled(listed, own["epochs"].value)
    values = {**listed, **own}
    _check_shared(config, values)
    first = part.first(*place, before)
    left_out = {*_BEGINS, *(n for n, entry in first.items() if getattr(config, n) == entry.value)}
    if base != before:
        left_out |= {*_RATES}
    if "epochs" in values and values["epochs"].value != config.epochs:
        left_out |= _scheduled(config)
    inherited = {
        name: value
        for name, value in inherited_settings(config).items()
        if name not in left_out and name not in values
    }
    overrides = {name: entry.value for name, entry in values.items() if name not in NAMES}
    chosen = chosen_parts({**inherited, **overrides, **names})
    for name in overrides.keys() & own.keys():
        check_applies(name, chosen)
    overrides = {name: value for name, value in overrides.items() if applies_to(name, chosen)}
    made = inherited_recipe(names, inherited, overrides)
    return made.config(), _sources(made.sources, sources, inherited, values)


def _base(optimizer: str, values: Mapping[str, Entry], config: TrainConfig) -> str | None:
    """Return the base optimizer of a stage.

    Args:
        optimizer: name of its optimizer.
        values: values that the stage sets itself.
        config: settings of the run, whose base optimizer it takes over.
    """
    own = OPTIMIZERS[optimizer].base
    if own is None and "base_optimizer" in values:
        own = str(values["base_optimizer"].value)
    return own or base_of(config)


def _sources(
    made: Mapping[str, str],
    before: Mapping[str, str],
    inherited: Mapping[str, Any],
    values: Mapping[str, Entry],
) -> dict[str, str]:
    """Return the source of each setting of a stage by name."""
    found = dict(made)
    for name in [*found, *(name for name in NAMES if name in values)]:
        if name in values:
            entry = values[name]
            found[name] = entry.source + ("" if entry.known else " (not a published value)")
        elif name in inherited:
            found[name] = before.get(name, "the run")
    return found


def _scheduled(config: TrainConfig) -> set[str]:
    """Return the settings that are epochs of schedules, and those that belong to them."""
    every = [settings_of(type(part)) for part in (config, *config.parts.values())]
    found = {item.name for items in every for item in items if item.metadata["scaled"] is not None}
    steps = {item.name for item in settings_of(type(config.parts["lr_schedule"]))}
    return found | (steps if found & steps else set())


def _check_shared(config: TrainConfig, values: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if a stage sets what all stages have in common."""
    parts = (config.parts["data"], config.parts["model"])
    shared = {item.name for part in parts for item in settings_of(type(part))} | {*_SHARED}
    placed = {item.name for item in settings_of(type(config)) if item.metadata["place"]}
    shared |= placed - {*_MEASURED}
    for name in values:
        if name in shared:
            raise UsageError(f"{name} is the same in all stages; set it for the whole run")


def _check_head(config: TrainConfig, before: PlannedStage) -> None:
    """Raise :class:`UsageError` if a stage would lose the head of the stage that it starts from."""
    head = before.config.head
    if config.head_from is not None or config.head == head:
        return
    if head != "linear" or HEADS[config.head].from_linear is None:
        raise UsageError(
            f"its head {config.head} cannot take over the head {head} of stage {before.name}; train that "
            "stage with a method whose head is linear, such as ce, or set head_from=fresh for a new head"
        )


def _set_by_name(config: TrainConfig, part: StageList) -> dict[str, dict[str, Entry]]:
    """Return the values of ``stage_set`` by stage and setting."""
    names: Sequence[str] = [stage.name for stage in part.stages]
    found: dict[str, dict[str, Entry]] = {}
    for text in config.stage_set:
        place, equals, value = text.partition("=")
        stage, dot, name = place.partition(".")
        name = name.strip().replace("-", "_")
        if not (equals and dot):
            raise UsageError(
                f"stage_set must be STAGE.SETTING=VALUE, such as {names[-1]}.lr=0.05, got {text!r:.60}"
            )
        if stage not in names:
            raise UsageError(f"stage_set {text!r:.60}: {unknown('stage', stage, names)}")
        try:
            parsed = _parsed(name, value)
        except UsageError as error:
            raise UsageError(f"stage_set {text!r:.60}: {error}") from error
        if name in found.get(stage, {}):
            raise UsageError(f"stage_set sets {name} of {stage} twice; pass it once")
        found.setdefault(stage, {})[name] = Entry(parsed, "stage_set")
    return found


def _parsed(name: str, value: str) -> Any:
    """Parse a value of ``stage_set``: also none for optional settings, and no values."""
    item, hint = find_setting(name)
    if item.metadata["optional"] and value.strip() == "none":
        return None
    several = get_origin(hint) is tuple
    return () if several and not value.strip() else parse_setting(name, value)
