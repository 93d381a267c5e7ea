"""Command-line options derived from settings. The parts named on the command line decide which exist."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, fields, make_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from tyro.conf import OmitArgPrefixes, arg
from tyro.constructors import PrimitiveConstructorSpec

from fastsam.longtail.config import (
    TrainConfig,
    check_applies,
    chosen_parts,
    find_setting,
)
from fastsam.longtail.data import DATASETS, DataSetPart
from fastsam.longtail.registry import registered_settings, registries
from fastsam.longtail.settings import Entry, choices, settings_of
from fastsam.records import field_types

NAMES = ("data", "method", "optimizer")
"""The settings that select a recipe. Commands declare these options themselves."""

_TITLES = {
    "data": "data set",
    "loss": "loss",
    "rule": "rule",
    "weighting": "rule",
    "optimizer": "optimizer",
    "base_optimizer": "optimizer",
    "rho_schedule": "optimizer",
    "recipe": "recipe",
    "stages": "stages",
    "model": "network",
    "head": "network",
    "init": "network",
    "head_from": "network",
    "freeze": "network",
    "batch_norm": "network",
    "mixer": "mixing",
    "lr": "learning rate",
    "lr_scale": "learning rate",
    "layer_decay": "learning rate",
    "no_decay": "learning rate",
    "lr_schedule": "learning rate",
    "track_curvature": "curvature",
    "curvature_classes": "curvature",
    "curvature_images": "curvature",
    "curvature_budget": "curvature",
}
"""Titles of the option groups in the help, by kind of part or by name of a setting of the run."""
_SETTING = re.compile(r"(?<!\.)\b[a-z]+(?:_[a-z]+)+\b")
"""Words in a help text that may be names of settings; attributes such as torch.channels_last are not."""
_ORDER = (*dict.fromkeys(_TITLES.values()), "training", "machine")


def named(name: str, default: str = "") -> Any:
    """Build the help entry of ``--data``, ``--method`` or ``--optimizer``.

    Args:
        name: name of the setting.
        default: default as the help shows it.
    """
    help_text = find_setting(name)[0].metadata["help"]
    return arg(help=help_text, metavar="NAME", help_behavior_hint=default)


def with_settings(
    base: type[Any],
    settings: Mapping[str, tuple[Field[Any], Any]],
    *,
    shorter: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    note: str = "",
) -> Any:
    """Return ``base`` extended by an option for each of ``settings``. An option that is not passed is None.

    The help shows one group of options for each kind of part. :func:`flattened` removes the groups after
    parsing.

    Args:
        base: a frozen dataclass with the other options.
        settings: field and type of each setting by name.
        shorter: other names of options, shown first, by name of the setting.
        recipe: values that the help shows as the recipe's.
        given: values that a file sets already; options override them.
        note: text that the help shows above the options of each group.
    """
    titles = _titles()
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, (item, hint) in settings.items():
        kind = hint | None
        if kind == bool | None:
            kind = Annotated[kind, _SWITCH]
        elif any(isinstance(choice, str) for choice in choices(hint)):
            kind = (
                str | None
            )  # the setting's own check lists the choices and suggests the closest one
        value = (given or {}).get(name)
        shown = _shown(item, hint, (shorter or {}).get(name), _default(item, value, recipe))
        common = name in TrainConfig.__dataclass_fields__
        title = _common_title(name) if common else titles.get(name, "training")
        groups.setdefault(title, []).append((name, Annotated[kind, shown], value))
    options = [option for group in groups.values() for option in group]
    flat = make_dataclass(base.__name__, options, bases=(base,), frozen=True)
    boxes = []
    for title in sorted(groups, key=_ORDER.index):
        box = make_dataclass(title.title().replace(" ", ""), groups[title], frozen=True)
        box.__doc__ = note
        shown_box = Annotated[box, arg(name=title), OmitArgPrefixes]  # type: ignore[valid-type]
        boxes.append((f"{title.replace(' ', '_')}_group", shown_box, box()))
    grouped = make_dataclass(
        base.__name__, boxes, bases=(base,), frozen=True, namespace={"flat": flat}
    )
    grouped.__doc__ = base.__doc__
    return grouped


def flattened(parsed: Any) -> Any:
    """Return a parsed command with its settings as direct fields, without the groups of the help."""
    flat = getattr(type(parsed), "flat", None)
    if flat is None:
        return parsed
    values = {item.name: getattr(parsed, item.name) for item in fields(parsed)}
    for name in [name for name in values if name.endswith("_group")]:
        box = values.pop(name)
        values |= {item.name: getattr(box, item.name) for item in fields(box)}
    return flat(**values)


def every_setting(*, plugins: bool = False) -> dict[str, tuple[Field[Any], Any]]:
    """Return field and type of every setting that any run can have, by name.

    Args:
        plugins: load all plug-ins first.
    """
    return {**_common(), **registered_settings(plugins=plugins)}


def settings_of_run(values: Mapping[str, Any]) -> dict[str, tuple[Field[Any], Any]]:
    """Return field and type of the settings of one run, by name.

    Args:
        values: settings of the run by name, at least ``data``, ``method`` and ``optimizer``.

    Raises:
        UsageError: if a part has an unknown name.
    """
    found = {**_common()}
    for part in chosen_parts(values).values():
        hints = field_types(part.settings)
        found |= {item.name: (item, hints[item.name]) for item in settings_of(part.settings)}
    return found


def settings_of_data(arguments: Sequence[str]) -> dict[str, tuple[Field[Any], Any]]:
    """Return field and type of the settings of the data set in ``arguments``, or of all data sets."""
    named = _named_data(arguments)
    found: dict[str, tuple[Field[Any], Any]] = {}
    for part in DATASETS.examples().values() if named is None else (named,):
        hints = field_types(part.settings)
        found |= {item.name: (item, hints[item.name]) for item in settings_of(part.settings)}
    return found


def recipe_of_data(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the values in the recipe of the data set in ``arguments``, by name; none if it names no set."""
    named = _named_data(arguments)
    return {} if named is None else {name: entry.value for name, entry in named.recipe.items()}


def given(command: object) -> dict[str, Any]:
    """Return the settings that were passed on the command line, by name."""
    known = {*_common(), *registered_settings()}
    values = {item.name: getattr(command, item.name) for item in fields(command)}  # type: ignore[arg-type]
    return {k: v for k, v in values.items() if k in known and k not in NAMES and v is not None}


def named_parts(arguments: Sequence[str]) -> dict[str, str]:
    """Return the parts named on a command line: the values of options such as ``--data`` and ``--model``."""
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


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of an option in a command line that is not parsed yet: the last one counts.

    Args:
        arguments: the command line.
        option: the option with its dashes.

    Returns:
        The text after ``=``, or the next argument, empty if there is none; None without the option.

    Example:
        >>> option_value(["--at", "1", "--at=2"], "--at")
        '2'
    """
    found = None
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else "".join(arguments[place + 1 : place + 2])
    return found


def parts_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Select from ``values`` the settings that name a part of a run."""
    return {k: v for k, v in values.items() if k in NAMES or _names_a_part(k)}


def refuse_settings_of_others(
    arguments: Sequence[str], have: Collection[str], values: Mapping[str, Any]
) -> None:
    """Check that no option is a setting of a part that the run does not use.

    Args:
        arguments: the command line.
        have: options of the command and settings of the run.
        values: settings of the run by name.

    Raises:
        UsageError: if an option belongs to another part.
    """
    every: dict[str, Any] | None = None
    for argument in arguments:
        name = _setting_name(argument.partition("=")[0])
        if name is None or name in have:
            continue
        every = every_setting(plugins=True) if every is None else every
        if name in every:
            check_applies(name, chosen_parts(values))


def _named_data(arguments: Sequence[str]) -> DataSetPart | None:
    """Return the data set that an argument names, or else the value of an option, which may be a folder."""
    options = ("", *arguments)
    values = [before.startswith("--") and "=" not in before for before in options]
    known = [DATASETS.get(argument) for argument in arguments]
    named = [
        part for part, value in zip(known, values, strict=False) if part is not None and not value
    ]
    return next((part for part in (*named, *known) if part is not None), None)


@cache
def _common() -> Mapping[str, tuple[Field[Any], Any]]:
    hints = field_types(TrainConfig)
    return {
        item.name: (item, hints[item.name])
        for item in settings_of(TrainConfig)
        if item.name not in NAMES
    }


def _setting_name(option: str) -> str | None:
    """Convert ``--lr-factors`` to ``lr_factors``; return None for anything but a long option."""
    return option[2:].replace("-", "_") if option.startswith("--") and len(option) > 2 else None


def _option_name(setting: str) -> str:
    """Convert ``lr_factors`` to ``--lr-factors``."""
    return f"--{setting.replace('_', '-')}"


def _as_option(name: re.Match[str]) -> str:
    """Convert the name of a setting in a text to that of its option; leave other words."""
    return _option_name(name[0]) if name[0] in every_setting() else name[0]


def _names_a_part(name: str) -> bool:
    every = every_setting()
    return name in every and every[name][0].metadata["names"] is not None


def _titles() -> dict[str, str]:
    """Return the title of the option group of every setting of a part, by name."""
    titles: dict[str, str] = {}
    for registry in registries():
        if registry.kind not in _TITLES:
            continue
        for part in registry.examples().values():
            for name in part.settings.__dataclass_fields__:
                titles.setdefault(name, _TITLES[registry.kind])
    return titles


def _common_title(name: str) -> str:
    """Return the title of the option group of a setting that all runs have."""
    place = TrainConfig.__dataclass_fields__[name].metadata.get("place", False)
    return _TITLES.get(name, "machine" if place or name == "threads" else "training")


def _default(item: Field[Any], given: Any, recipe: Mapping[str, Any] | None) -> str:
    """Return the default of a setting as the help shows it."""
    if given is not None:
        return f"(file: {_text(given)})"
    entry, words = item.metadata["default"], item.metadata["default_text"]
    default = entry.value if isinstance(entry, Entry) else None
    value = (recipe or {}).get(item.name)
    if value is not None and (words is None or value != default):
        return f"(recipe: {_text(value)})"
    if words is not None or default is not None:
        return f"(default: {_text(default) if words is None else words})"
    return "" if item.metadata["optional"] else "(default: from the recipe)"


def _shown(item: Field[Any], hint: Any, shorter: str | None, behavior: str) -> Any:
    """Build the help entry of a setting's option, which names other settings as options."""
    names = item.metadata["names"]
    word = "TEXT" if names is None else "NAME"
    kinds = {bool: "[True|False]", int: "INT", float: "FLOAT", str: word}
    used = [kind for kind in (hint, *get_args(hint)) for kind in (kind, *get_args(kind))]
    metavar = next((text for kind, text in kinds.items() if kind in used), None)
    metavar = "|".join(map(str, choices(hint))) or metavar
    help_text = item.metadata["help"]
    if names is not None:
        help_text += f". One of: {', '.join(names.names())}"
    many = any(get_origin(kind) is tuple for kind in used)
    return arg(
        name=shorter,
        aliases=None if shorter is None else [_option_name(item.name)],
        help=_SETTING.sub(_as_option, help_text),
        metavar=f"{metavar} ..." if many else metavar,
        help_behavior_hint=behavior,
    )


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _switched(values: list[str]) -> bool:
    """Parse a boolean option: True if no value follows its name."""
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
