"""Construction of dataclasses from parsed files, with checks of types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")


def field_types(cls: type) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields by name.

    The annotations are strings. Evaluating them takes longer than all other checks of a value, so they are
    evaluated once for each class.
    """
    return _evaluated(cls)


@cache
def _evaluated(cls: type) -> Mapping[str, Any]:
    return MappingProxyType(get_type_hints(cls))


def build(cls: type[_Record], values: object, **ready: Any) -> _Record:
    """Construct a dataclass from a mapping of its fields; nested dataclasses are built from mappings.

    Args:
        cls: the dataclass.
        values: values by field name. Missing fields get their defaults, as in files of older versions.
        **ready: values that are passed to the dataclass unchecked.

    Raises:
        ValueError: a name is unknown or missing, or a value has a wrong type.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Point:
        ...     x: float
        ...     label: str | None = None
        >>> build(Point, {"x": 1})
        Point(x=1, label=None)
        >>> build(Point, {"x": "1"})
        Traceback (most recent call last):
            ...
        ValueError: x must be a number, got '1'
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be a mapping, got {_short(values)}")
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no {name!r:.60}")
    for name, item in known.items():
        optional = item.default is not MISSING or item.default_factory is not MISSING
        if name not in values and name not in ready and not optional:
            raise ValueError(f"{name} is missing")
    hints = field_types(cls)
    own = {name: converted(value, hints[name], name) for name, value in values.items()}
    return cls(**own, **ready)


def converted(value: object, hint: Any, name: str) -> Any:
    """Convert ``value`` to the type ``hint``: mappings to dataclasses, lists to tuples.

    Raises:
        ValueError: the value has a wrong type; the message begins with ``name``.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        (hint,) = (choice for choice in arguments if choice is not NoneType)
        return converted(value, hint, name)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value)
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(converted(item, arguments[0], name) for item in value)
    if origin is dict and isinstance(value, dict) and arguments[1] is not Any:
        return {
            converted(key, arguments[0], name): converted(item, arguments[1], f"{name}.{key}")
            for key, item in value.items()
        }
    if not _fits(value, hint, origin, arguments):
        raise ValueError(f"{name} must be {_described(hint)}, got {_short(value)}")
    return value


def _fits(value: object, hint: Any, origin: Any, arguments: tuple[Any, ...]) -> bool:
    if hint is Any:
        return True
    if origin is Literal:  # check only the type: the dataclass checks its values
        return type(value) in map(type, arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint if origin is None else origin) and origin not in (list, tuple)


_WORDS = {
    float: "a number",
    int: "a whole number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


def _described(hint: Any) -> str:
    """Describe a type in the words of a settings file."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    known = _WORDS.get(get_origin(hint) or hint)
    return str(getattr(hint, "__name__", hint)) if known is None else known


def _short(value: object) -> str:
    """Return the first 60 characters of a value's ``repr``."""
    return f"{value!r:.60}"
