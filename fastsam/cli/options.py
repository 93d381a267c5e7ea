"""Options for settings: which ones a command line has depends on the parts that it names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields, make_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from fastsam.longtail.config import TrainConfig, check_applies, chosen_parts
from fastsam.longtail.data import DATASETS
from fastsam.longtail.registry import registered_settings
from fastsam.longtail.settings import choices, settings_of

NAMES = ("data", "method", "optimizer")
"""The settings that name a recipe; commands declare them on their own."""


def with_settings(
    base: type[Any],
    settings: Mapping[str, tuple[Field[Any], Any]],
    *,
    shown_as: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Any:
    """``base`` with an option for each of ``settings``; those that are not given are None.

    Args:
        base: a frozen dataclass with the other options.
        settings: field and type of each setting by name.
        shown_as: other names of options, by the names of their settings.
        recipe: values that the help shows as those of the recipe.
    """
    options = []
    for name, (item, hint) in settings.items():
        kind = hint | None
        if kind == bool | None:
            kind = Annotated[kind, _SWITCH]
        behavior = f"(recipe: {_text(recipe[name])})" if recipe and name in recipe else ""
        shown = _shown(item, hint, (shown_as or {}).get(name), behavior)
        options.append((name, Annotated[kind, shown], None))
    command = make_dataclass(base.__name__, options, bases=(base,), frozen=True)
    command.__doc__ = base.__doc__
    return command


def every_setting(*, plugins: bool = False) -> dict[str, tuple[Field[Any], Any]]:
    """Field and type of every setting of any run.

    Args:
        plugins: load all plug-ins first.
    """
    return {**_common(), **registered_settings(plugins=plugins)}


def settings_of_run(values: Mapping[str, Any]) -> dict[str, tuple[Field[Any], Any]]:
    """Field and type of the settings of a run.

    Args:
        values: its settings by name, at least ``data``, ``method`` and ``optimizer``.

    Raises:
        UsageError: for an unknown name.
    """
    found = _common()
    for part in chosen_parts(values).values():
        hints = get_type_hints(part.settings)
        found |= {item.name: (item, hints[item.name]) for item in settings_of(part.settings)}
    return found


def settings_of_data(arguments: Sequence[str]) -> dict[str, tuple[Field[Any], Any]]:
    """Field and type of the settings of the data set that a command line names, else of all."""
    named = [DATASETS[argument] for argument in arguments if DATASETS.get(argument) is not None]
    found: dict[str, tuple[Field[Any], Any]] = {}
    for part in named[:1] or DATASETS.examples().values():
        hints = get_type_hints(part.settings)
        found |= {item.name: (item, hints[item.name]) for item in settings_of(part.settings)}
    return found


def given(command: object) -> dict[str, Any]:
    """The settings that a command line names."""
    known = {*_common(), *registered_settings()}
    values = {item.name: getattr(command, item.name) for item in fields(command)}  # type: ignore[arg-type]
    return {k: v for k, v in values.items() if k in known and k not in NAMES and v is not None}


def named_parts(arguments: Sequence[str]) -> dict[str, str]:
    """The parts that a command line names: values of options such as ``--data`` and ``--model``."""
    found: dict[str, str] = {}
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        name = _setting_name(option)
        if name is None or not (name in NAMES or _names_a_part(name)):
            continue
        if not equals:
            value = arguments[place + 1] if place + 1 < len(arguments) else ""
        if value and not value.startswith("-"):
            found[name] = value
    return found


def refuse_settings_of_others(
    arguments: Sequence[str], have: Collection[str], values: Mapping[str, Any]
) -> None:
    """Raise :class:`UsageError` for an option that is a setting of parts that the run does not have.

    Args:
        arguments: the command line.
        have: options of the command and settings of the run.
        values: settings of the run by name.
    """
    every: dict[str, Any] | None = None
    for argument in arguments:
        name = _setting_name(argument.partition("=")[0])
        if name is None or name in have:
            continue
        every = every_setting(plugins=True) if every is None else every
        if name in every:
            check_applies(name, chosen_parts(values))


def _common() -> dict[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(TrainConfig)
    return {
        item.name: (item, hints[item.name])
        for item in settings_of(TrainConfig)
        if item.name not in NAMES
    }


def _setting_name(option: str) -> str | None:
    """``lr_factors`` of ``--lr-factors``; None for anything but a long option."""
    return option[2:].replace("-", "_") if option.startswith("--") and len(option) > 2 else None


def _names_a_part(name: str) -> bool:
    every = every_setting()
    return name in every and every[name][0].metadata["names"] is not None


def _shown(item: Field[Any], hint: Any, name: str | None, behavior: str) -> Any:
    """How the option of a setting is shown in the help."""
    kinds = {bool: "[True|False]", int: "INT", float: "FLOAT", str: "NAME"}
    used = [kind for kind in (hint, *get_args(hint)) for kind in (kind, *get_args(kind))]
    metavar = next((text for kind, text in kinds.items() if kind in used), None)
    metavar = "|".join(map(str, choices(hint))) or metavar
    many = any(get_origin(kind) is tuple for kind in used)
    return arg(
        name=name,
        help=item.metadata["help"],
        metavar=f"{metavar} ..." if many else metavar,
        help_behavior_hint=behavior,
    )


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _switched(values: list[str]) -> bool:
    """The value of a setting that is on or off: on if nothing follows its name."""
    if len(values) > 1:
        raise ValueError("expected True or False")
    return values != ["False"]


_SWITCH = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[True|False]",
    choices=("True", "False"),
    instance_from_str=_switched,
    is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda value: [str(value)],
)
