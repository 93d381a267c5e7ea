"""Exceptions. Each message is one line and ends with what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LongTailError(Exception):
    """Base of errors that the user can fix. The command line prints the message and exits with code 1."""


class UsageError(LongTailError, ValueError):
    """An argument or setting is invalid, or contradicts another one (exit code 2)."""


class DataError(LongTailError, ValueError):
    """Files, labels or counts are missing, damaged or inconsistent."""


class CheckpointError(LongTailError):
    """A checkpoint is missing, damaged, in another format, or belongs to another run."""


class DamagedError(CheckpointError):
    """A checkpoint file is truncated or changed, or is not a checkpoint."""


class ChangedRunError(CheckpointError):
    """Another process wrote to the folder of a run after this process had read it."""


class TrainingError(LongTailError):
    """Training or evaluation failed, for instance because the loss is infinite or NaN."""


def unknown(kind: str, name: object, valid: Iterable[object], *, brief: bool = False) -> UsageError:
    """Return the error for an unknown name. It suggests the closest valid name and lists all.

    Args:
        kind: what is named.
        name: the unknown name.
        valid: the valid names.
        brief: do not list them if there is a suggestion.

    Example:
        >>> str(unknown("color", "gren", ["red", "green"]))
        "unknown color 'gren', did you mean 'green'? valid: red, green"
        >>> str(unknown("color", "x", ["red", "green"]))
        "unknown color 'x'; valid: red, green"
    """
    names = [str(item) for item in valid]
    hint = suggestion(name, names)
    if hint and brief:
        return UsageError(f"unknown {kind} {name!r:.80}{hint}")
    return UsageError(f"unknown {kind} {name!r:.80}{hint or ';'} valid: {', '.join(names)}")


def suggestion(name: object, valid: Iterable[str]) -> str:
    """Return the end of an error message that suggests the closest valid name; empty if none is close.

    Example:
        >>> suggestion("gren", ["red", "green"])
        ", did you mean 'green'?"
    """
    names = {known.lower(): known for known in valid}
    close = get_close_matches(str(name).lower(), names, n=1)
    return f", did you mean {names[close[0]]!r}?" if close else ""
