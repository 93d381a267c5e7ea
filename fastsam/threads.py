"""Temporary changes of the number of CPU threads that torch uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class _Change:
    """An open context: its Python thread, and the number of threads that it will restore."""

    thread: int
    before: int


_LOCK = threading.Lock()
_OPEN: list[_Change] = []
"""The open contexts of the process, in the order in which they were entered."""


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Use ``count`` CPU threads inside the context, and restore the number afterwards.

    Contexts may be nested, and may overlap in several Python threads: torch has a number for each
    Python thread, and one that new threads inherit. A context that closes before a later one passes the
    number that it found to that one, so that the last to close restores the number before the first.

    Args:
        count: number of threads; None or 0 to change nothing.

    Example:
        >>> with cpu_threads(1):
        ...     torch.get_num_threads()
        1
    """
    if not count:
        yield
        return
    with _LOCK:
        own = _Change(threading.get_ident(), torch.get_num_threads())
        torch.set_num_threads(count)
        _OPEN.append(own)
    try:
        yield
    finally:
        with _LOCK:
            place = _OPEN.index(own)
            later = _OPEN[place + 1 :]
            del _OPEN[place]
            if later:
                later[0].before = own.before
            if own.thread not in [change.thread for change in later]:
                torch.set_num_threads(own.before)
