"""``run.yaml``: the settings of a run in a file that users can edit and train from.

Each line has a comment with the source of its value. PyYAML cannot write comments, so this module writes the
file itself, which also works without PyYAML. Reading accepts any YAML mapping of plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsam import __version__
from fastsam.extras import requires_extra
from fastsam.longtail.config import TrainConfig, find_setting, settings_in
from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.registry import registered_settings
from fastsam.longtail.settings import current_value, settings_of
from fastsam.records import converted

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Strings that YAML 1.1 reads as booleans or null unless they are quoted."""


@dataclass(frozen=True)
class RunFile:
    """Content of a file of settings.

    Attributes:
        path: path of the file.
        settings: settings of the run by name. The recipe supplies missing ones.
        options: values of other keys by name.
        stages: list of stages, as :func:`fastsam.longtail.stage_plan.stages_from` reads it; None without one.
    """

    path: Path
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    stages: list[Any] | None = None


def read_run_file(path: Path, *, options: Iterable[str] = ()) -> RunFile:
    """Read a file of settings.

    Args:
        path: a YAML file whose keys are names of settings, written with ``_`` or ``-``.
        options: other keys that are allowed.

    Raises:
        UsageError: if the file is not a YAML mapping, has an unknown or duplicate key, or has a value that is
            not a number, a string, a boolean or a list of these.
        ImportError: if PyYAML is not installed.
    """
    values: dict[str, Any] = {}
    found = dict(_load(path))
    stages = found.pop("stages") if isinstance(found.get("stages"), list) else None
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name in values:
            raise UsageError(f"{path}: duplicate key {name}; remove one of them")
        plain = value if isinstance(value, list) else [value]
        if not all(isinstance(item, bool | int | float | str) for item in plain):
            raise UsageError(
                f"{path}: {name} is {value!r:.60}; expected a number, a string, true, false, or a list of "
                "these"
            )
        values[name] = tuple(value) if isinstance(value, list) else value
    known = {*options}
    common = {item.name for item in settings_of(TrainConfig)}
    for name in values.keys() - known - common:
        if name not in registered_settings() and name not in registered_settings(plugins=True):
            valid = sorted({*known, *common, *registered_settings()})
            raise UsageError(f"{path}: {unknown('setting', name, valid, brief=True)}")
    return RunFile(
        path,
        {name: _checked(path, name, value) for name, value in values.items() if name not in known},
        {name: value for name, value in values.items() if name in known},
        stages,
    )


def run_file_text(
    config: TrainConfig,
    sources: Mapping[str, str],
    *,
    options: Mapping[str, Any],
    processes: int = 1,
) -> str:
    """Return the text of a file that repeats the run, bit for bit on the same machine.

    Args:
        config: settings of the run.
        sources: source of each setting, by name.
        options: other keys with their values; None and empty values are omitted.
        processes: number of processes that train the run.
    """
    stored = config.as_dict()
    launcher = "" if processes == 1 else f"torchrun --nproc-per-node {processes} --no-python "
    notes = [
        f"fastsam {__version__}. To repeat this run:",
        f"{launcher}fastsam train --config run.yaml --out DIR",
        *(
            f"requires the plug-in {name}: {package}"
            for name, package in stored.get("plugins", {}).items()
        ),
    ]
    kept = {name: value for name, value in options.items() if value not in (None, (), [])}
    lines = [f"# {note}" for note in notes]
    for name, value in {**settings_in(stored), **kept}.items():
        line = f"{name}: {_yaml(value)}"
        source = sources.get(name)
        lines.append(line if source is None else f"{line}  # {_printable(source)}")
    return "\n".join(lines) + "\n"


def _load(path: Path) -> Mapping[Any, Any]:
    with requires_extra("longtail", f"reading {path}"):
        import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """A loader of plain values that reads ``1e-4`` as a number (YAML 1.2) and rejects duplicate keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise UsageError(f"{path}: duplicate key {key}; remove one of them")
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+"),
        list("-+.0123456789"),
    )
    try:
        found = yaml.load(path.read_text("utf-8"), Loader)
    except OSError as error:
        raise UsageError(
            f"cannot read --config {path}: {error.strerror}; pass a file such as the run.yaml of a run"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UsageError(
            f"{path} is not a YAML file of plain values: {error}; expected lines such as `epochs: 60`"
        ) from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{path} contains no settings; expected lines such as `epochs: 60`")
    return found


def _checked(path: Path, name: str, value: Any) -> Any:
    try:
        return of_type(name, value)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def of_type(name: str, value: Any) -> Any:
    """Convert a plain value, as files and options contain it, to the type of a setting.

    A file may have 1 for 1.0 or "1", or a number where the setting is a tuple with one value per phase.

    Raises:
        UsageError: if the value has the wrong type.
    """
    item, hint = find_setting(name)
    value = current_value(item, value)
    items = value if isinstance(value, tuple) else (value,)
    if "float" in str(hint):
        items = tuple(float(item) if type(item) is int else item for item in items)
    elif hint is str:
        items = tuple(str(item) if type(item) in (int, float) else item for item in items)
    try:
        if "tuple" in str(hint) or isinstance(value, tuple):
            return converted(items, hint, name)
        return converted(items[0], hint, name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_setting(name: str, text: str) -> Any:
    """Parse a value of a setting; spaces separate the values of a setting with several.

    Raises:
        UsageError: if the setting is unknown, or the value has a wrong type.

    Example:
        >>> parse_setting("lr_milestones", "80 90"), parse_setting("rho", "0.1"), parse_setting("kind", "exp")
        ((80, 90), (0.1,), 'exp')
    """
    hint = find_setting(name)[1]
    words = text.split()
    plain = tuple(words if hint is str else map(_plain, words))
    if not plain:
        raise UsageError(f"{name} has an empty value; pass a value, or several with spaces")
    return of_type(name, plain if len(plain) > 1 else plain[0])


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_yaml(item)}' for name, item in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return _printable(json.dumps(value, ensure_ascii=False))


def _printable(text: str) -> str:
    """Replace characters that are not allowed in YAML by escapes, which are valid in quoted strings."""
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)


def _plain(word: str) -> bool | int | float | str:
    """Convert a word to the plain value that it is in YAML."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
