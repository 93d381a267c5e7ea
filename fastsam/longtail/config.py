"""Settings of a training run: common settings, and the settings of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.losses.base import LOSSES
from fastsam.longtail.methods import RULES, Method
from fastsam.longtail.mixers import check_mixing
from fastsam.longtail.models.heads import HEADS
from fastsam.longtail.registry import Registry, RunPart, registered_settings, registries
from fastsam.longtail.run_settings import RunSettings
from fastsam.longtail.settings import Settings, check_values, current_value, settings_of
from fastsam.records import build, field_types

FORMAT = 2
"""Version of the stored form. Version 1 stored None for every setting that a run does not have."""
_RECORD = ("format", "plugins")
"""Entries of the stored form that are not settings."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunSettings):
    """All settings of one run, with their final values.

    A run is made of parts: a data set, an augmentation, a loss, a rule, an optimizer, a network, a head and
    schedules. The
    settings of each part are in ``parts``, and can be read as attributes like common settings, for instance
    ``config.rho``. A setting of a part that the run does not have reads as None.

    :func:`fastsam.longtail.recipe` fills in published values; :meth:`create` takes every value as an
    argument.

    Attributes:
        parts: settings of each part by its kind: ``data``, ``augmentation``, ``loss``, ``rule``,
            ``optimizer``, ``model``, ``head``, ``lr_schedule``, and the parts that these select in turn.

    Raises:
        UsageError: if a name is unknown, a value is out of range, a setting is missing, or a setting does not
            belong to the chosen parts.

    Example:
        >>> from fastsam.longtail import recipe
        >>> config = recipe("digits-lt", "ce-drw", "sam", rho=0.1).config()
        >>> config.rho, config.parts["loss"]
        ((0.1,), CrossEntropySettings(label_smoothing=0.0))
    """

    parts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        flat = self.flat()
        chosen = chosen_parts(flat)
        for kind, part in chosen.items():
            if type(self.parts.get(kind)) is not part.settings:
                raise UsageError(
                    f"settings of {kind} {part.name} are missing; call TrainConfig.create() or "
                    "config.replace(), which sort settings into parts by name"
                )
        run = {**flat, "parts": self.parts}
        if self.warmup_epochs > self.epochs:
            raise UsageError(
                f"warmup_epochs must be at most epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if self.ema is not None and self.ema >= 1:
            raise UsageError(
                f"ema must be below 1, got {self.ema:g}, which would never update the average; try 0.99"
            )
        if self.compile and self.checkpoint_activations:
            raise UsageError(
                "compile cannot be combined with checkpoint_activations: torch.compile decides by itself "
                "which activations to compute again; pass one of them"
            )
        needed = chosen["loss"].head
        if needed is not None and chosen["head"].logits != needed:
            fitting = [name for name, head in HEADS.items() if head.logits == needed]
            more = [name for name in fitting if name != needed]
            raise UsageError(
                f"loss {self.parsed_method.loss!r} requires head={needed!r}, got {self.head!r}"
                + (f"; other heads that fit: {', '.join(more)}" if more else "")
            )
        if self.mixer != "none":
            for term in chosen["loss"].examples(self.parts["loss"]):
                check_mixing(run, term)
        for settings in self.parts.values():
            settings.check(run)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name != "parts":
            for settings in self.parts.values():
                if name in settings.__dataclass_fields__:
                    return getattr(settings, name)
            if name in registered_settings():
                return None
        raise AttributeError(f"there is no setting {name!r}")

    def flat(self) -> dict[str, Any]:
        """Return every setting of the run by name."""
        values = {item.name: getattr(self, item.name) for item in settings_of(TrainConfig)}
        for settings in self.parts.values():
            for item in settings_of(type(settings)):
                values[item.name] = getattr(settings, item.name)
        return values

    def replace(self, **values: Any) -> TrainConfig:
        """Return a copy with some settings changed. If a part changes, pass all settings of the new part."""
        return TrainConfig.create(**{**self.flat(), **values})

    @property
    def run(self) -> dict[str, Any]:
        """:meth:`flat` with ``parts``, the mapping that parts receive as ``run``."""
        return {**self.flat(), "parts": self.parts}

    @property
    def parsed_method(self) -> Method:
        """The method, parsed into loss and rule."""
        return Method.parse(self.method)

    def as_dict(self) -> dict[str, Any]:
        """Convert to the stored form: values that JSON and ``torch.load(weights_only=True)`` accept."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.flat().items()
            if value is not None
        }
        outside = {
            f"{kind} {part.name}": part.package
            for kind, part in chosen_parts(values).items()
            if part.package != "fastsam"
        }
        return {"format": FORMAT, **values, **({"plugins": outside} if outside else {})}

    @classmethod
    def create(cls, **values: Any) -> TrainConfig:
        """Create a configuration from settings by name. Every setting of its parts is required.

        Raises:
            UsageError: if a setting does not exist, is missing, or has the wrong type.
        """
        values = _current({k: value for k, value in values.items() if value is not None})
        common = {item.name: item for item in settings_of(cls)}
        for name in ("data", "method", "optimizer"):
            if name not in values:
                raise UsageError(f"{name} is missing: {common[name].metadata['help']}")
            if not isinstance(values[name], str):
                raise UsageError(f"{name} must be a string, got {values[name]!r:.60}")
        stored = list(values)
        values |= before(values)
        chosen = chosen_parts(values)
        for name in stored:
            check_applies(name, chosen)
        check_values(cls, values)  # before the settings of parts, whose checks use these
        settings = {kind: _built(part.settings, values) for kind, part in chosen.items()}
        config: TrainConfig = _built(cls, values, parts=settings)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Create a configuration from the result of :meth:`as_dict`, also of older versions.

        Raises:
            UsageError: if a setting does not exist, is missing, or has the wrong type, or a plug-in is
                missing.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"settings must be a mapping, got {values!r:.60}")
        values = dict(values)
        version, plugins = values.pop("format", 1), values.pop("plugins", {})
        if version not in (1, FORMAT):
            raise UsageError(
                f"settings have format {version!r:.20}, but this version of fastsam reads 1 and {FORMAT}; "
                "install the version that wrote them"
            )
        try:
            return cls.create(**values)
        except UsageError as error:
            missing = plugins if isinstance(plugins, dict) else {}
            if not missing:
                raise
            what = ", ".join(f"{part} of package {package}" for part, package in missing.items())
            raise UsageError(f"{error}; the run used plug-ins, install them: {what}") from error


def _built(cls: type[Any], values: Mapping[str, Any], **more: Any) -> Any:
    """Create a settings dataclass from the entries of ``values`` that are its fields."""
    own: dict[str, Any] = {}
    for item in settings_of(cls):
        if item.name in values:
            own[item.name] = values[item.name]
        elif item.default is MISSING:
            raise UsageError(f"{item.name} is missing: {item.metadata['help']}")
    try:
        return build(cls, own, **more)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def chosen_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts that settings select, by kind, including parts selected by settings of parts.

    Args:
        values: settings by name; at least ``data``, ``method`` and ``optimizer``. Parts without a setting
            in ``values`` are omitted.

    Raises:
        UsageError: if a part has an unknown name.
    """
    method = Method.parse(values["method"])
    chosen: dict[str, RunPart] = {"loss": LOSSES[method.loss], "rule": RULES[method.rule]}

    def add(settings: type[Settings]) -> None:
        for item in settings_of(settings):
            registry: Registry[Any] | None = item.metadata["names"]
            if registry is not None and values.get(item.name) is not None:
                chosen[registry.kind] = registry[current_value(item, values[item.name])]
                add(chosen[registry.kind].settings)

    add(TrainConfig)
    for part in list(chosen.values()):
        add(part.settings)
    return chosen


def applies(name: str, chosen: Mapping[str, RunPart]) -> bool:
    """Return whether a run with these parts has the setting ``name``.

    Raises:
        UsageError: if no part has a setting of this name.
    """
    if name in TrainConfig.__dataclass_fields__ and name != "parts":
        return True
    if any(name in part.settings.__dataclass_fields__ for part in chosen.values()):
        return True
    if name in registered_settings() or name in registered_settings(plugins=True):
        return False
    common = (item.name for item in settings_of(TrainConfig))
    raise unknown("setting", name, sorted({*common, *registered_settings()}), brief=True)


def check_applies(name: str, chosen: Mapping[str, RunPart]) -> None:
    """Raise :class:`UsageError` unless a run with these parts has the setting ``name``."""
    if not applies(name, chosen):
        owners = {
            registry.kind: names
            for registry in registries()
            if (
                names := [
                    shown
                    for shown, part in registry.examples().items()
                    if name in part.settings.__dataclass_fields__
                ]
            )
        }
        reasons = " or ".join(f"{kind} {', '.join(names)}" for kind, names in owners.items())
        have = ", ".join(
            f"{kind} {chosen[kind].name if kind in chosen else 'none'}" for kind in owners
        )
        raise UsageError(f"{name} requires {reasons}, but the run has {have}")


def find_setting(name: str) -> tuple[Any, Any]:
    """Return field and type of a setting, which may be common or belong to a part.

    Raises:
        UsageError: if there is no such setting.
    """
    hints = field_types(TrainConfig)
    known = {item.name: (item, hints[item.name]) for item in settings_of(TrainConfig)}
    if name not in known:
        known |= registered_settings(plugins=name not in registered_settings())
    if name not in known:
        raise unknown("setting", name, sorted(known), brief=True)
    return known[name]


def before(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of settings that did not exist yet when ``values`` were stored, by name."""
    if any(name not in values for name in ("data", "method", "optimizer")):
        return {}
    found: dict[str, Any] = {}
    while True:
        known = {**values, **found}
        kinds = (TrainConfig, *(part.settings for part in chosen_parts(known).values()))
        more = {
            item.name: item.metadata["before"]
            for cls in kinds
            for item in settings_of(cls)
            if known.get(item.name) is None and item.metadata["before"] is not None
        }
        if not more:  # a value may select a part whose settings have values too
            return found
        found |= more


def place_settings() -> Iterator[str]:
    """Return the names of settings that determine only where a run is executed or what is measured of it."""
    every = {item.name: item for item in settings_of(TrainConfig)}
    every |= {name: item for name, (item, _) in registered_settings().items()}
    return (name for name, item in every.items() if item.metadata["place"])


def settings_in(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a stored form of any version, without those that are None."""
    return _current({k: v for k, v in stored.items() if k not in _RECORD and v is not None})


def _current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace former values of common settings by those that stand for them."""
    common = {item.name: item for item in settings_of(TrainConfig)}
    return {k: current_value(common[k], v) if k in common else v for k, v in values.items()}
