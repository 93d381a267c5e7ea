"""Errors of the command line in one line: unknown options, wrong values, missing arguments.

tyro prints such errors as boxes of many lines. :func:`parsed` keeps what it prints and says the same in
the words of fastsam: which option, what it takes, and what was given.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from io import StringIO
from itertools import takewhile
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import Positional

from fastsam.longtail.errors import UsageError

_KINDS = {bool: "True or False", int: "a whole number", float: "a number"}
_POSITIONAL = get_args(Positional[int])[1]
_SEVERAL = {int: "whole numbers", float: "numbers"}


def parsed(command: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
    """Return what tyro parses from ``arguments``.

    Args:
        command: a dataclass, or a union of dataclasses with one for each subcommand.
        arguments: the command line after ``prog``.
        prog: program and command, for the help.
        options: other arguments of ``tyro.cli``.

    Raises:
        UsageError: if the arguments do not fit the command.
        SystemExit: for ``--help`` (code 0).
    """
    printed = StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(command, prog=prog, args=arguments, **options)
    except SystemExit as stopped:
        if stopped.code != 2:
            raise
        message = _explained(printed.getvalue(), dict(_options(command, arguments)), arguments)
        raise UsageError(f"{message}; see `{prog} --help`") from None


def _explained(printed: str, options: dict[str, Any], arguments: Sequence[str]) -> str:
    """Say in one line what a box of tyro says.

    Args:
        printed: the box.
        options: type of each option by name.
        arguments: the command line.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed).translate({ord("│"): " ", ord("─"): "-"})
    lines = plain.splitlines()
    # Without Unicode, a line of dashes follows the title and nothing frames the rows.
    rows = [line[2:].rstrip() for line in lines[1 if "╭" in plain else 2 : -1]]
    head = list(takewhile(lambda row: not row.startswith("---"), rows))
    reason = " ".join(" ".join(head).split())
    if reason.startswith("Unrecognized"):
        first = _unknown(reason.partition(": ")[2].split(", ")[0], options, arguments)
        known = [row.partition(": ")[2] for row in rows if row.startswith("Available")]
        return f"{first}{', expected one of ' if known else ''}{' '.join(known)}"
    if reason.startswith("Missing from"):
        names = [row.strip() for row in head if re.match(r" {4}\S", row)]
        return f"missing {', '.join(names)}"
    named = [name for name in re.findall(r"--[\w-]+", reason) if name in options]
    if not named:
        return reason
    expected = _described(options[named[0]])
    values = _values(named[0], arguments)
    if not values:
        return f"{named[0]} requires a value, {expected}"
    return f"{named[0]} must be {expected}, got {' '.join(values)!r:.80}"


def _unknown(first: str, options: dict[str, Any], arguments: Sequence[str]) -> str:
    """Name the first unknown option and the closest known one, or else the unexpected argument."""
    for argument in arguments:
        name = argument.partition("=")[0]
        if not name.startswith("--") or name == "--" or name.replace("_", "-") in options:
            continue
        close = get_close_matches(name[2:], [option[2:] for option in options], n=1)
        return f"unknown option {name:.80}" + (f", did you mean --{close[0]}?" if close else "")
    return f"unexpected argument {first!r:.80}"


def _options(command: Any, arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Iterate over the options of a command, or of the subcommand in ``arguments``, with their types."""
    if get_origin(command) in (Union, types.UnionType):
        for member in get_args(command):
            cls, *notes = get_args(member)
            if {getattr(note, "name", None) for note in notes} & set(arguments[:1]):
                yield from _options(cls, arguments[1:])
        return
    hints = get_type_hints(command, include_extras=True)
    for item in fields(command):
        hint = hints[item.name]
        hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if _POSITIONAL in notes:
            continue
        if is_dataclass(hint):
            yield from _options(hint, arguments)
        else:
            names = [note.name for note in notes if isinstance(getattr(note, "name", None), str)]
            more = (alias for note in notes for alias in getattr(note, "aliases", None) or ())
            for name in (*(names or [item.name]), *more):
                yield f"--{name.removeprefix('--').replace('_', '-')}", hint


def _described(hint: Any) -> str:
    """Describe the values of a type, as in ``one or more numbers``."""
    members = [hint, *get_args(hint)]
    for member in members:
        if get_origin(member) is Literal:
            return " or ".join(map(str, get_args(member)))
        if get_origin(member) is tuple:
            return f"one or more {_plural(get_args(member)[0])}"
    return next((text for kind, text in _KINDS.items() if kind in members), "a value")


def _plural(hint: Any) -> str:
    """Describe several values of a type, as in ``integers, or all``."""
    if hint in _SEVERAL:
        return _SEVERAL[hint]
    names = [name for member in get_args(hint) for name in get_args(member)]
    kinds = [_SEVERAL[member] for member in get_args(hint) if member in _SEVERAL]
    return ", or ".join([*kinds, *map(str, names)]) or "values"


def _values(option: str, arguments: Sequence[str]) -> list[str]:
    """Return the values that follow an option on the command line."""
    values: list[str] = []
    inside = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            inside = name.replace("_", "-") == option
            values += [value] if inside and equals else []
        elif inside:
            values.append(argument)
    return values
