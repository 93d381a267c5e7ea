"""``run.yaml``: the settings of a run as a file that people read, edit and train from.

The writer is here because PyYAML writes no comments: each line names the source of its value. So writing
needs no package either. Reading takes any YAML of plain values.
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
from fastsam.longtail.settings import settings_of
from fastsam.records import converted

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Texts that YAML takes for truth values unless they are quoted."""


@dataclass(frozen=True)
class RunFile:
    """What a file says about a run.

    Attributes:
        path: the file.
        settings: settings of the run by name; those of the recipe are used where one is missing.
        options: values of the other keys by name.
    """

    path: Path
    settings: Mapping[str, Any]
    options: Mapping[str, Any]


def read_run_file(path: Path, *, options: Iterable[str] = ()) -> RunFile:
    """Read a file of settings.

    Args:
        path: a YAML file whose keys are the names of settings, with ``_`` or ``-``.
        options: other keys that may occur.

    Raises:
        UsageError: the file cannot be read as YAML, is no mapping, or has a key that is no setting, a key
            twice, or a value that is not a number, a text, a truth value or a list of these.
        ImportError: PyYAML is not installed.
    """
    values: dict[str, Any] = {}
    for key, value in _load(path).items():
        name = str(key).replace("-", "_")
        if name in values:
            raise UsageError(f"{path}: {name} is given twice; leave one out")
        plain = value if isinstance(value, list) else [value]
        if not all(isinstance(item, bool | int | float | str) for item in plain) or not plain:
            raise UsageError(
                f"{path}: {name} is {value!r:.60}; expected a number, a text, true or false, or a list"
            )
        values[name] = tuple(value) if isinstance(value, list) else value
    known = {*options}
    common = {item.name for item in settings_of(TrainConfig)}
    for name in values.keys() - known - common:
        if name not in registered_settings() and name not in registered_settings(plugins=True):
            valid = sorted({*known, *common, *registered_settings()})
            raise UsageError(f"{path}: {unknown('setting', name, valid)}")
    return RunFile(
        path,
        {name: _of_type(path, name, value) for name, value in values.items() if name not in known},
        {name: value for name, value in values.items() if name in known},
    )


def run_file_text(
    config: TrainConfig,
    sources: Mapping[str, str],
    *,
    options: Mapping[str, Any],
    processes: int = 1,
) -> str:
    """The text of a file that trains the run again, with the same bits on the same machine.

    Args:
        config: settings of the run.
        sources: where each setting comes from.
        options: other keys with their values; those that are None or empty are left out.
        processes: number of processes that train the run.
    """
    stored = config.as_dict()
    launcher = "" if processes == 1 else f"torchrun --nproc-per-node {processes} --no-python "
    notes = [
        f"fastsam {__version__}. Train this run again:",
        f"{launcher}fastsam train --config run.yaml --out DIR",
        *(
            f"needs the plug-in {name}: {package}"
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
        """Plain values only, numbers as in YAML 1.2 (``1e-4``), and no key twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise UsageError(f"{path}: {key} is given twice; leave one out")
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
            f"--config {path} cannot be read: {error.strerror}; name a file such as the run.yaml of a run"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UsageError(
            f"{path} is not YAML of plain values: {error}; expected lines such as `epochs: 60`"
        ) from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{path} holds no settings; expected lines such as `epochs: 60`")
    return found


def _of_type(path: Path, name: str, value: Any) -> Any:
    """A value as its setting is typed.

    YAML knows other types: 1 for 1.0 and for "1", and one number where the setting has one for each phase.

    Raises:
        UsageError: the value is of a wrong type.
    """
    hint = find_setting(name)[1]
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
        raise UsageError(f"{path}: {error}") from error


def _yaml(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return _printable(json.dumps(value, ensure_ascii=False))


def _printable(text: str) -> str:
    """``text`` with the characters that YAML files cannot hold as escapes of a quoted text."""
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)
