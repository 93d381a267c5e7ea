"""Parts of a run by name: losses, optimizers, data sets, networks and the like.

A part lives in one file: its class, its settings, and a line that registers it. Parts of the package
are found by importing the modules of their folder. Parts of other packages are found through the
entry points of the group ``fastsam.plugins``, which are loaded when a name is unknown or a full list
is asked for, never at import.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, get_type_hints

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.settings import Layer, NoSettings, Settings, settings_of

PLUGINS = "fastsam.plugins"
"""Group of the entry points that name the modules of plug-ins."""


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """A part of a run that a setting names.

    Attributes:
        name: its name on the command line.
        summary: one line about it.
        build: what makes it; each registry says of what.
        settings: its settings.
        recipe: values that the recipe of a run with this part takes, its own or others.
    """

    name: str
    summary: str
    build: Callable[..., Any]
    settings: type[Settings] = NoSettings
    recipe: Layer = field(default_factory=dict)

    @property
    def package(self) -> str:
        """Name of the top-level package that the part comes from."""
        return self.build_module.partition(".")[0]

    @property
    def build_module(self) -> str:
        """Module that defines ``build``."""
        made_by = getattr(self.build, "func", self.build)  # of a functools.partial
        return str(getattr(made_by, "__module__", type(made_by).__module__))


P = TypeVar("P", bound=RunPart)


class Registry(Mapping[str, P], Generic[P]):
    """The parts of one kind.

    Args:
        kind: what a part is, for messages: ``loss``, ``optimizer``, ...
        home: package whose modules register the parts of fastsam; None where the module of the
            registry itself does.
    """

    def __init__(self, kind: str, home: str | None = None) -> None:
        self.kind = kind
        self._home = home
        self._parts: dict[str, P] = {}
        self._families: dict[str, Callable[[str], P]] = {}
        self._removed: dict[str, str] = {}
        _REGISTRIES.append(self)

    def add(self, part: P) -> P:
        """Register a part.

        Raises:
            ValueError: the name is taken, or a setting has the name of another one, or lacks the
                prefix that settings of plug-ins need.
        """
        if not part.name or part.name != part.name.strip() or " " in part.name:
            raise ValueError(f"a {self.kind} cannot be named {part.name!r}")
        if part.name in self._parts and self._parts[part.name].build_module != part.build_module:
            raise ValueError(
                f"{self.kind} {part.name!r} is registered already, by "
                f"{self._parts[part.name].build_module}; choose another name"
            )
        _check_fields(part)
        self._parts[part.name] = part
        return part

    def add_family(self, prefix: str, make: Callable[[str], P]) -> None:
        """Register all names that begin with ``prefix``.

        Args:
            prefix: for instance ``timm:``.
            make: makes the part of a full name. All parts of a family have the same settings.

        Raises:
            ValueError: see :meth:`add`, of the settings.
        """
        _check_fields(make(f"{prefix}NAME"))
        self._families[prefix] = make

    def remove(self, name: str, reason: str) -> None:
        """Register the name of a part that earlier versions had.

        Args:
            name: its name.
            reason: what became of it and what to do, as the error for the name says it.
        """
        self._removed[name] = reason

    def names(self, *, plugins: bool = False) -> tuple[str, ...]:
        """Names of the parts in alphabetical order; families are shown as ``prefixNAME``.

        Args:
            plugins: load all plug-ins first.
        """
        self._load_home()
        if plugins:
            load_plugins()
        return tuple(self.examples())

    def examples(self) -> dict[str, P]:
        """Return every part by name; for each family a single one, by the name ``prefixNAME``."""
        self._load_home()
        families = {f"{prefix}NAME": make for prefix, make in sorted(self._families.items())}
        return {**self, **{name: make(name) for name, make in families.items()}}

    def __getitem__(self, name: str) -> P:
        """The part called ``name``.

        Raises:
            UsageError: there is none, plug-ins included.
        """
        part: P | None = self.get(name)
        if part is None:
            if name in self._removed:
                raise UsageError(f"{self.kind} {name} was removed: {self._removed[name]}")
            error = unknown(self.kind, name, self.names())
            failed = "".join(f"; plug-in {key}: {why}" for key, why in load_plugins().items())
            raise UsageError(f"{error}{failed}")
        return part

    def get(self, name: str, default: Any = None) -> Any:
        """The part called ``name``, or ``default``."""
        self._load_home()
        if self._find(name) is None:
            load_plugins()
        part = self._find(name)
        return default if part is None else part

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        self._load_home()
        return iter(sorted(self._parts))

    def __len__(self) -> int:
        self._load_home()
        return len(self._parts)

    def _find(self, name: str) -> P | None:
        if name in self._parts or not isinstance(name, str):
            return self._parts.get(name)
        for prefix, make in self._families.items():
            if name.startswith(prefix) and len(name) > len(prefix):
                return make(name)
        return None

    def _load_home(self) -> None:
        if self._home is not None:
            _import_modules(self._home)


_REGISTRIES: list[Registry[Any]] = []
_MEANINGS: dict[str, tuple[Field[Any], Any, str]] = {}
"""Every registered setting by name: field, type and the class that declares it."""


def registries() -> tuple[Registry[Any], ...]:
    """Every registry there is."""
    return tuple(_REGISTRIES)


def registered_settings(*, plugins: bool = False) -> dict[str, tuple[Field[Any], Any]]:
    """Field and type of every setting of every registered part, by name.

    Args:
        plugins: load all plug-ins first.
    """
    for registry in _REGISTRIES:
        registry.names(plugins=plugins)
    return {name: (item, hint) for name, (item, hint, _) in _MEANINGS.items()}


@cache
def load_plugins() -> Mapping[str, str]:
    """Import the plug-ins of all installed packages, once.

    Returns:
        Reasons by name of the plug-ins that could not be imported.
    """
    failed = {}
    for point in entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:  # one broken package must not stop runs that do not need it
            failed[point.name] = f"{type(error).__name__}: {error}"
    return failed


@cache
def _import_modules(package: str) -> None:
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def _check_fields(part: RunPart) -> None:
    """Raise ValueError unless each setting of ``part`` means one thing and plug-ins use a prefix."""
    hints = get_type_hints(part.settings)
    prefix = part.name.replace("-", "_").replace(":", "_") + "_"
    for item in settings_of(part.settings):
        owner = _declared_in(part.settings, item.name)
        if not owner.startswith("fastsam.") and not item.name.startswith(prefix):
            raise ValueError(
                f"setting {item.name!r} of {part.name!r} must be named {prefix}{item.name}: settings "
                "of plug-ins begin with the name of their part"
            )
        meaning = (item, hints[item.name], owner)
        known = _MEANINGS.setdefault(item.name, meaning)
        if known[1] != meaning[1] or _meaning(known[0]) != _meaning(item):
            raise ValueError(
                f"setting {item.name!r} of {part.name!r} differs in type, bounds or help from the one "
                f"declared in {known[2]}; inherit that settings class, or choose another name"
            )


def _declared_in(settings: type[Settings], name: str) -> str:
    """Module of the class that declares a field."""
    owners = [cls for cls in settings.__mro__ if name in vars(cls).get("__annotations__", {})]
    return owners[-1].__module__


def _meaning(item: Field[Any]) -> dict[str, Any]:
    return {key: value for key, value in item.metadata.items() if key != "default"}
