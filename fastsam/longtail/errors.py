"""What can go wrong, as exceptions whose message is one line and says what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LongTailError(Exception):
    """A problem the user can mend. The command line prints its message and exits with code 1."""


class UsageError(LongTailError, ValueError):
    """The call itself asks for something that does not exist or makes no sense (exit code 2)."""


class DataError(LongTailError, ValueError):
    """Files, labels or counts are missing or disagree with each other."""


class CheckpointError(LongTailError):
    """A checkpoint is missing, damaged, not ours, or of another model."""


class DamagedError(CheckpointError):
    """A file is not the checkpoint that was written: truncated, changed, or something else."""


class TrainingError(LongTailError):
    """Training cannot go on, for instance because the loss is no longer finite."""


def unknown(kind: str, name: object, valid: Iterable[object]) -> UsageError:
    """The error for a name that is not in a list, naming the closest one and the whole list.

    Example:
        >>> str(unknown("colour", "gren", ["red", "green"]))
        "unknown colour 'gren', did you mean 'green'? valid: red, green"
        >>> str(unknown("colour", "x", ["red", "green"]))
        "unknown colour 'x'; valid: red, green"
    """
    names = [str(item) for item in valid]
    close = get_close_matches(str(name), names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ";"
    return UsageError(f"unknown {kind} {name!r:.80}{hint} valid: {', '.join(names)}")
