"""Errors of runs with several ranks: the name of a missing rank, and a file for each rank that fails."""

from __future__ import annotations

import os
import platform
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastsam.stopping import Stopped, StopRequest
from fastsam.text import one_line

ERROR_FILE = "error-rank-{}.txt"
"""Name of the file with the error of a rank, in the folder of the run."""
_KEY = "fastsam/error/{}"
_WAITED = "waited"
_STOPPED = "stopped"
_REACT_SECONDS = 0.5
"""Time in which a living rank says that it fails, too, once its collective has failed."""
_LONGEST_SECONDS = 60.0
"""Longest time for which a rank waits for the others to say that they fail, too."""
_SIGNS = re.compile(
    r"\b(gloo|nccl|connection closed by peer|connection reset|timed out waiting)\b", re.IGNORECASE
)
"""Words in the messages of failed collectives. Gloo raises plain RuntimeErrors."""


class RankError(RuntimeError):
    """Raised if a collective failed because another rank failed or did not take part."""


@contextmanager
def reported_errors(
    rank: int,
    world_size: int,
    *,
    timeout: float,
    folder: Path | None = None,
    stop: StopRequest | None = None,
) -> Iterator[None]:
    """Report an error of this rank inside the context, and explain one that another rank caused.

    The error is written to ``error-rank-RANK.txt`` in ``folder`` if the folder exists, and to the file that
    ``torchrun`` reads. A file of an earlier run is removed first.

    If a collective fails, every rank that notices says so in the store of the process group, and waits for up
    to a minute for the others. A rank that says nothing is missing. After a signal to stop, it does not wait.

    Args:
        rank: rank of this process.
        world_size: number of processes.
        timeout: seconds after which collectives fail.
        folder: folder of the run; None to write no file there.
        stop: request to stop by a signal, for instance of a launcher that has noticed the failure.

    Raises:
        RankError: if a collective failed; the message names the ranks that failed or are missing.
    """
    own = None if folder is None else folder / ERROR_FILE.format(rank)
    if own is not None:
        own.unlink(missing_ok=True)
    try:
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if not _is_of_a_collective(error):
                raise
            cause = _cause(rank, world_size, timeout, stop)
            if cause is None:
                raise Stopped(
                    "stopped by a signal to another process; nothing was saved. Run the same command again"
                ) from error
            raise RankError(
                f"rank {rank}: {cause}. Its own error is in {ERROR_FILE.format('N')} of the run, if it could "
                "write it. If it was only slow, raise --rank-timeout"
            ) from error
    except Stopped:
        _say(rank, _STOPPED)
        raise
    except Exception as error:
        if not isinstance(error, RankError):
            _say(rank, f"{type(error).__name__}: {error}")
        write_error(error, rank, own)
        raise


def _is_of_a_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or _SIGNS.search(str(error)) is not None


def _cause(rank: int, world_size: int, timeout: float, stop: StopRequest | None) -> str | None:
    """Return which ranks failed or are missing, as a phrase; None if a signal stopped another rank."""
    others = [other for other in range(world_size) if other != rank]
    _say(rank, _WAITED)
    end = time.monotonic() + min(timeout + 5.0, _LONGEST_SECONDS)
    said: dict[int, str] = {}
    try:
        store = _store()
        while time.monotonic() < end:
            if stop:
                time.sleep(_REACT_SECONDS)
                end = 0.0
            for other in others:
                if other not in said and store.check([_KEY.format(other)]):
                    said[other] = store.get(_KEY.format(other)).decode()
            if _STOPPED in said.values():
                return None
            failed = {other: text for other, text in said.items() if text != _WAITED}
            if failed:
                return "; ".join(f"rank {other} failed: {text}" for other, text in failed.items())
            if len(said) == len(others):
                return (
                    "all ranks are alive, but a collective failed: they wait in different ones, or the "
                    "network failed"
                )
            time.sleep(0.1)
    except Stopped:
        pass  # a signal during the wait
    except (dist.DistError, RuntimeError):
        return "the store through which the ranks report errors is gone, perhaps with rank 0"
    missing = [other for other in others if other not in said]
    names = " and ".join(map(str, missing))
    what = f"rank {names} did" if len(missing) == 1 else f"ranks {names} did"
    return f"{what} not take part in a collective within {timeout:g} seconds"


def _say(rank: int, text: str) -> None:
    """Tell the other ranks about the error of this one."""
    # An error means that the store is gone, and with it the rank that holds it.
    with suppress(dist.DistError, RuntimeError, ValueError):
        _store().set(_KEY.format(rank), one_line(text))


def _store() -> Any:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=5))
    return store


def write_error(error: Exception, rank: int, path: Path | None) -> None:
    """Write an error with its traceback to the file of a rank and to that of ``torchrun``.

    :func:`read_error` reads the file.

    Args:
        error: the error.
        rank: rank of this process.
        path: the file, which is written if its folder exists; None for no file.
    """
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    if path is not None and path.parent.is_dir():
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        head = f"rank {rank} on {platform.node()}, process {os.getpid()}, {when}"
        # The traceback is for people: its last line may be one of a long message, or a note.
        text = "".join(traceback.format_exception(error))
        path.write_text(f"{head}\n{type(error).__name__}: {one_line(error)}\n\n{text}", "utf-8")


def read_error(path: Path) -> str:
    r"""Return the error in a file of :func:`write_error`, in one line that begins with the name of its class.

    It is empty if there is no file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / ERROR_FILE.format(0)
        >>> write_error(ValueError("two\nlines"), 0, path)
        >>> read_error(path)
        'ValueError: two lines'
    """
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return lines[1] if len(lines) > 1 else ""
