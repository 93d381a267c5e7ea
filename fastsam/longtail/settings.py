"""Settings of a run's parts: frozen dataclasses whose fields carry help texts, bounds and sources.

Configuration, command-line options, validation and recipes are derived from these fields. A part declares
each of its settings once, next to its code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

from fastsam.longtail.errors import UsageError, unknown
from fastsam.records import field_types

DEFAULT = "default"
"""Source of values that are the defaults of settings."""


@dataclass(frozen=True)
class Entry:
    """A value of a recipe.

    Attributes:
        value: value of the setting.
        source: where the value comes from.
        known: whether the value was published; False for a starting point.
    """

    value: Any
    source: str
    known: bool = True


Layer = Mapping[str, Entry]
"""Values of settings with their sources, by name."""


def layer(source: str, *, known: bool = True, **values: Any) -> dict[str, Entry]:
    """Return a layer whose values have the same source."""
    return {name: Entry(value, source, known) for name, value in values.items()}


def borrowed(values: Layer, source: str) -> dict[str, Entry]:
    """Return the values of another recipe, marked as starting points."""
    return {name: Entry(entry.value, source, known=False) for name, entry in values.items()}


def matching(table: Mapping[tuple[str, ...], Layer] | Any, *names: str) -> dict[str, Entry]:
    """Return the values of all layers whose patterns match; later layers override earlier ones.

    Args:
        table: layers by shell patterns, one for each of the names.
        *names: for instance the data set and the method of a run.

    Example:
        >>> table = {("cifar*", "*"): layer("one", lr=0.1), ("cifar10", "ce"): layer("two", lr=0.2)}
        >>> matching(table, "cifar10", "ce")["lr"].value, matching(table, "cifar10", "bs")["lr"].value
        (0.2, 0.1)
    """
    found: dict[str, Entry] = {}
    for patterns, values in table.items():
        if all(map(fnmatchcase, names, patterns)):
            found |= values
    return found


def factor_text(imbalance: float | None) -> str:
    """Return an imbalance factor as patterns match it; empty for a data set without one."""
    return "" if imbalance is None else f"{imbalance:g}"


def setting(
    help_text: str,
    *,
    default: Any = MISSING,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    before: Any = None,
    optional: bool = False,
    place: bool = False,
    scaled: int | None = None,
    names: Any = None,
    argument: str | None = None,
    default_text: str | None = None,
    former: Mapping[str, Any] | None = None,
) -> Any:
    """Declare a field of a settings dataclass.

    Declare choices by the field's type, ``Literal[...]``.

    Args:
        help_text: meaning and unit, as shown by ``--help``.
        default: value in recipes that do not set one; an :class:`Entry` names its source.
        low: smallest valid value.
        high: largest valid value.
        above: valid values are greater than this.
        before: value in runs that were stored before the setting existed.
        optional: whether a run may omit the setting; it is then None.
        place: whether the setting only determines where the run is executed, like the device, or what is
            measured of it. Runs that differ in such settings count as the same run.
        scaled: set it for epochs that recipes scale with the number of epochs of the run: the number of
            epochs that must follow.
        names: registry of the parts that the value selects from.
        argument: name of the argument of the part's constructor that receives the value.
        default_text: default as ``--help`` shows it, for a default that depends on the machine, and for the
            meaning of None.
        former: values that stand for former values, by the text of the former value. Stored runs, files and
            commands may still have those.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class FocalSettings(Settings):
        ...     focal_gamma: float = setting("exponent of the focal loss", default=1.0, low=0)
        >>> FocalSettings(focal_gamma=2.0)
        FocalSettings(focal_gamma=2.0)
        >>> FocalSettings(focal_gamma=-1.0)
        Traceback (most recent call last):
            ...
        fastsam.longtail.errors.UsageError: focal_gamma must be at least 0, got -1.0
    """
    metadata = {
        "help": help_text,
        "default": default if default is MISSING or isinstance(default, Entry) else _plain(default),
        "argument": argument,
        "low": low,
        "high": high,
        "above": above,
        "before": before,
        "optional": optional,
        "place": place,
        "scaled": scaled,
        "names": names,
        "default_text": default_text,
        "former": former or {},
    }
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


def _plain(value: Any) -> Entry:
    return Entry(value, DEFAULT)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of settings dataclasses. Creating an instance checks each value.

    Raises:
        UsageError: if a value is out of range or is not one of the choices.
    """

    def __post_init__(self) -> None:
        check_values(type(self), vars(self))

    def arguments(self) -> dict[str, Any]:
        """Return the settings that are arguments of the part's constructor, by name of the argument."""
        named = ((item.metadata["argument"], item.name) for item in settings_of(type(self)))
        return {argument: getattr(self, name) for argument, name in named if argument is not None}

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise :class:`UsageError` if a setting contradicts another setting of the run.

        Args:
            run: all settings of the run by name.
        """


@dataclass(frozen=True, kw_only=True)
class NoSettings(Settings):
    """Settings of a part that has none."""


@dataclass(frozen=True, kw_only=True)
class DeferralSettings(Settings):
    """Setting of parts that take effect late in a run."""

    defer_epoch: int = setting(
        "deferral epoch: last epoch before drw, drs or ib takes effect", low=0, scaled=1
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that the deferral epoch is before the last epoch."""
        super().check(run)
        if self.defer_epoch >= run["epochs"]:
            raise UsageError(
                f"defer_epoch must be below epochs ({run['epochs']}), got {self.defer_epoch}; the deferred "
                f"phase of {run['method']} would never begin"
            )


def settings_of(cls: type[Settings]) -> Iterator[Field[Any]]:
    """Iterate over the fields of a settings dataclass that are settings."""
    return (item for item in fields(cls) if "help" in item.metadata)


def current_value(item: Field[Any], value: Any) -> Any:
    """Return the value that stands for a former value of a setting, or the full name of a part.

    Other values are returned unchanged.

    Args:
        item: field of the setting.
        value: a value of any version.
    """
    if not isinstance(value, bool | str):
        return value
    value, registry = item.metadata["former"].get(str(value), value), item.metadata["names"]
    return value if registry is None else registry.full_name(value)


def check_values(cls: type[Settings], values: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if a value is out of range or is not one of the choices.

    Args:
        cls: a settings dataclass.
        values: values by name. Settings without a value are not checked.
    """
    hints = field_types(cls)
    for item in settings_of(cls):
        if item.name in values:
            _check_value(item, hints[item.name], values[item.name])


def value_text(value: Any) -> str:
    """Return a value as text for names of folders and for tables.

    Example:
        >>> value_text((0.05, 0.5)), value_text(50.0), value_text(0.12345678)
        ('0.05-0.5', '50', '0.12345678')
    """
    if isinstance(value, tuple):
        return "-".join(map(value_text, value))
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def check_rising(name: str, milestones: tuple[int, ...], epochs: int) -> None:
    """Raise :class:`UsageError` unless milestones are in ascending order and lie within the run."""
    if list(milestones) != sorted(milestones) or any(m > epochs for m in milestones):
        raise UsageError(
            f"{name} must be in ascending order and at most epochs ({epochs}), got {milestones}"
        )


def choices(hint: Any) -> tuple[Any, ...]:
    """Return the choices of a ``Literal`` type, which may be optional; empty for other types."""
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


def _check_value(item: Field[Any], hint: Any, given: Any) -> None:
    valid = choices(hint)
    if valid and given is not None and given not in valid:
        raise unknown(item.name, given, valid)
    values = given if isinstance(given, tuple) else (given,)
    low, high, above = (item.metadata[name] for name in ("low", "high", "above"))
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        fits = math.isfinite(value) and (high is None or value <= high)
        if fits and (low is None or value >= low) and (above is None or value > above):
            continue
        bound = "finite"
        if above is not None:
            bound = f"above {above:g}"
        elif low is not None:
            bound = f"at least {low:g}"
        limit = "" if high is None else f" and at most {high:g}"
        raise UsageError(f"{item.name} must be {bound}{limit}, got {value}")
