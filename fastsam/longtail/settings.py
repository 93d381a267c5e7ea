"""Settings of a run's parts: frozen dataclasses whose fields say what they mean and what they may be.

Configuration, command-line options, validation and recipes are derived from these fields, so that a
part states each of its settings once, beside its code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastsam.longtail.errors import UsageError, unknown


@dataclass(frozen=True)
class Entry:
    """A value of a recipe.

    Attributes:
        value: the value of the setting.
        source: where it comes from.
        known: False where no source states the value and it is only a starting point.
    """

    value: Any
    source: str
    known: bool = True


Layer = Mapping[str, Entry]
"""Values of settings by name, with their sources."""


def layer(source: str, *, known: bool = True, **values: Any) -> dict[str, Entry]:
    """Return values that share one source."""
    return {name: Entry(value, source, known) for name, value in values.items()}


def borrowed(values: Layer, source: str) -> dict[str, Entry]:
    """Return the values of another recipe as starting points."""
    return {name: Entry(entry.value, source, known=False) for name, entry in values.items()}


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
) -> Any:
    """Declare a field of a settings dataclass.

    Choices are declared by the field's type, ``Literal[...]``.

    Args:
        help_text: meaning, unit and default, as the command line shows it.
        default: value that recipes take where nothing else sets one; an :class:`Entry` names its source.
        low: smallest value.
        high: largest value.
        above: largest value that is too small.
        before: value in runs that were stored before the setting existed.
        optional: whether a run may leave the setting out; it is None then.
        place: whether it says only where and how the run takes place, such as the device. Such a
            setting does not make it another run.
        scaled: for a number of epochs that recipes scale with the length of the run: how many epochs
            must follow it.
        names: registry of the parts that the value names.
        argument: argument of the part's constructor that the setting fills.

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
    }
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


def _plain(value: Any) -> Entry:
    return Entry(value, "default")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of every settings dataclass; it checks each value when an instance is made.

    Raises:
        UsageError: a value is out of range, or none of the choices.
    """

    def __post_init__(self) -> None:
        check_values(type(self), vars(self))

    def arguments(self) -> dict[str, Any]:
        """The settings that fill an argument of the part's constructor, by its name."""
        named = ((item.metadata["argument"], item.name) for item in settings_of(type(self)))
        return {argument: getattr(self, name) for argument, name in named if argument is not None}

    def check(self, run: Mapping[str, Any]) -> None:
        """Raise :class:`UsageError` if a setting contradicts another one of the run.

        Args:
            run: every setting of the run by name.
        """


@dataclass(frozen=True, kw_only=True)
class NoSettings(Settings):
    """Settings of a part that has none."""


@dataclass(frozen=True, kw_only=True)
class DeferralSettings(Settings):
    """The setting of everything that begins late in a run."""

    defer_epoch: int = setting("last epoch before drw, drs or ib take effect", low=0, scaled=1)

    def check(self, run: Mapping[str, Any]) -> None:
        """The deferral must end before the run does."""
        super().check(run)
        if self.defer_epoch >= run["epochs"]:
            raise UsageError(
                f"defer_epoch must be below epochs ({run['epochs']}), got {self.defer_epoch}: "
                f"{run['method']} would never take effect"
            )


def settings_of(cls: type[Settings]) -> Iterator[Field[Any]]:
    """The fields of a settings dataclass that are settings."""
    return (item for item in fields(cls) if "help" in item.metadata)


def check_values(cls: type[Settings], values: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if a value is out of range, or none of the choices.

    Args:
        cls: a settings dataclass.
        values: values by name; those that are missing are not checked.
    """
    hints = get_type_hints(cls)
    for item in settings_of(cls):
        if item.name in values:
            _check_value(item, hints[item.name], values[item.name])


def check_rising(name: str, milestones: tuple[int, ...], epochs: int) -> None:
    """Raise :class:`UsageError` unless milestones rise and lie within the run."""
    if list(milestones) != sorted(milestones) or any(m > epochs for m in milestones):
        raise UsageError(f"{name} must rise and be at most epochs ({epochs}), got {milestones}")


def choices(hint: Any) -> tuple[Any, ...]:
    """The choices of a ``Literal`` type, also inside an optional one; empty for other types."""
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
