"""Registries of the parts of a run: losses, optimizers, data sets, networks and others.

A part is one file with its class, its settings and a call that registers it. A registry finds the parts of
fastsam by importing the modules of a package. It finds parts of other packages through entry points of the
group ``fastsam.plugins``, which it loads only if a name is unknown or a full list is requested.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.settings import Layer, NoSettings, Settings, settings_of
from fastsam.records import field_types

PLUGINS = "fastsam.plugins"
"""Entry-point group of plug-in modules."""


@dataclass(frozen=True, kw_only=True)
class RunPart:
    """A registered part of a run, which a setting selects by name.

    Attributes:
        name: name on the command line.
        summary: one-line description.
        build: creates the part. The subclass for each kind of part documents the arguments.
        settings: dataclass of the settings of the part.
        recipe: values that this part contributes to recipes, for its own or other settings.
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
        made_by = getattr(self.build, "func", self.build)  # unwrap functools.partial
        return str(getattr(made_by, "__module__", type(made_by).__module__))


def _not_built() -> None:
    raise AssertionError("a part of values has nothing to build")


@dataclass(frozen=True, kw_only=True)
class ValuesPart(RunPart):
    """A part that consists of values of settings, so that there is nothing to build.

    Attributes:
        module: name of the module that defines the part: ``module=__name__``. Runs record its package.
    """

    module: str
    build: Callable[..., Any] = _not_built

    @property
    def build_module(self) -> str:
        """Module that defines the part."""
        return self.module


P = TypeVar("P", bound=RunPart)


class Registry(Mapping[str, P], Generic[P]):
    """Registered parts of one kind, by name.

    Args:
        kind: kind of part, for error messages: ``loss``, ``optimizer``, ...
        home: package whose modules register fastsam's parts; None if the module that creates the registry
            registers them.
    """

    def __init__(self, kind: str, home: str | None = None) -> None:
        self.kind = kind
        self._home = home
        self._parts: dict[str, P] = {}
        self._families: dict[str, Callable[[str], P]] = {}
        self._unlisted: set[str] = set()
        self._removed: dict[str, str] = {}
        _REGISTRIES.append(self)

    def add(self, part: P) -> P:
        """Register a part.

        Raises:
            ValueError: if the name is empty, has spaces or is taken, or if a setting conflicts with a setting
                of another part or lacks the prefix required of plug-ins.
        """
        if not part.name or part.name != part.name.strip() or " " in part.name:
            raise ValueError(
                f"the name of a {self.kind} must be non-empty and without spaces, got {part.name!r}"
            )
        if part.name in self._parts and self._parts[part.name].build_module != part.build_module:
            raise ValueError(
                f"{self.kind} {part.name!r} is already registered by "
                f"{self._parts[part.name].build_module}; choose another name"
            )
        _check_fields(part)
        self._parts[part.name] = part
        return part

    def add_family(self, prefix: str, make: Callable[[str], P], *, listed: bool = True) -> None:
        """Register all names that begin with ``prefix``.

        Args:
            prefix: prefix of the names, for instance ``timm:``.
            make: creates the part for a full name. All parts of a family must have the same settings.
            listed: whether :meth:`names` lists the family.

        Raises:
            ValueError: if a setting conflicts with another one; see :meth:`add`.
        """
        _check_fields(make(f"{prefix}NAME"))
        self._families[prefix] = make
        if not listed:
            self._unlisted.add(f"{prefix}NAME")

    def remove(self, name: str, reason: str) -> None:
        """Register the name of a part that was removed, for the error message.

        Args:
            name: name of the part.
            reason: why it was removed and what to use instead.
        """
        self._removed[name] = reason

    def names(self, *, plugins: bool = False) -> tuple[str, ...]:
        """Return the names of the parts in alphabetical order. Families appear as ``prefixNAME``.

        Args:
            plugins: load all plug-ins first.
        """
        self.load(plugins=plugins)
        families = (f"{prefix}NAME" for prefix in sorted(self._families))
        return tuple(name for name in (*self, *families) if name not in self._unlisted)

    def load(self, *, plugins: bool = False) -> None:
        """Import the modules that register the parts.

        Args:
            plugins: load all plug-ins, too.
        """
        self._load_home()
        if plugins:
            load_plugins()

    def examples(self) -> dict[str, P]:
        """Return every part by name. Each family is represented by one part, named ``prefixNAME``."""
        self._load_home()
        families = {f"{prefix}NAME": make for prefix, make in sorted(self._families.items())}
        return {**self, **{name: make(name) for name, make in families.items()}}

    def __getitem__(self, name: str) -> P:
        """Return the part called ``name``.

        Raises:
            UsageError: if neither fastsam nor a plug-in has such a part.
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
        """Return the part called ``name``, or ``default`` if there is none."""
        self._load_home()
        if self._find(name) is None:
            load_plugins()
        part = self._find(name)
        return default if part is None else part

    def full_name(self, name: Any) -> Any:
        """Return the name that the part called ``name`` has itself; other values are returned unchanged.

        A family may give a part another name than the one that was typed, such as an absolute path.
        """
        part = self._find(name)
        return name if part is None else part.name

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
"""Every registered setting by name: field, type, and module of the class that declares it."""


def registries() -> tuple[Registry[Any], ...]:
    """Return all registries."""
    return tuple(_REGISTRIES)


def registered_settings(*, plugins: bool = False) -> dict[str, tuple[Field[Any], Any]]:
    """Return field and type of every setting of every registered part, by name.

    Args:
        plugins: load all plug-ins first.
    """
    for registry in _REGISTRIES:
        registry.load(plugins=plugins)
    return {name: (item, hint) for name, (item, hint, _) in _MEANINGS.items()}


@cache
def load_plugins() -> Mapping[str, str]:
    """Import the plug-ins of all installed packages. Later calls return the same result.

    Returns:
        Error messages of plug-ins that could not be imported, by name of the plug-in.
    """
    failed = {}
    for point in entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:  # a broken plug-in must not stop runs that do not use it
            failed[point.name] = f"{type(error).__name__}: {error}"
    return failed


@cache
def _import_modules(package: str) -> None:
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def _check_fields(part: RunPart) -> None:
    """Check that settings of ``part`` agree with settings of the same name, and the prefix of plug-ins.

    Raises:
        ValueError: if a setting conflicts with a registered one, or lacks the prefix.
    """
    hints = field_types(part.settings)
    prefix = part.name.replace("-", "_").replace(":", "_") + "_"
    for item in settings_of(part.settings):
        owner = _declared_in(part.settings, item.name)
        if not owner.startswith("fastsam.") and not item.name.startswith(prefix):
            raise ValueError(
                f"setting {item.name!r} of plug-in {part.name!r} must begin with the name of the part; "
                f"rename it to {prefix}{item.name}"
            )
        meaning = (item, hints[item.name], owner)
        known = _MEANINGS.setdefault(item.name, meaning)
        if known[1] != meaning[1] or _meaning(known[0]) != _meaning(item):
            raise ValueError(
                f"setting {item.name!r} of {part.name!r} differs in type, bounds or help from the setting "
                f"of the same name in {known[2]}; inherit from its class or choose another name"
            )


def _declared_in(settings: type[Settings], name: str) -> str:
    """Return the module of the class that declares a field."""
    owners = [cls for cls in settings.__mro__ if name in vars(cls).get("__annotations__", {})]
    return owners[-1].__module__


def _meaning(item: Field[Any]) -> dict[str, Any]:
    return {key: value for key, value in item.metadata.items() if key != "default"}
