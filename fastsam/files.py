"""Write files whole or not at all, keep two processes out of one folder, and notice damaged JSON."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, cast

OWN_FILES = ".fastsam-"
"""Prefix of the lock and of temporary files, which do not count as content of a folder."""
_TEMPORARY = OWN_FILES + "{}.partial"
_LOCK = OWN_FILES + "lock"
_ABANDONED_SECONDS = 24 * 3600
"""Age at which a temporary file is an orphan on a file system that has no locks."""
_CHECKSUM = "sha256"


class FolderBusyError(OSError):
    """Another process writes to the folder."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace ``path`` with what ``write`` puts into the file that it is given.

    The content goes to a temporary file in the same folder, reaches the disk, and is renamed; then
    the folder reaches the disk. If anything fails, ``path`` is as it was. The mode is 0o666 without
    the bits of the umask. A symbolic link at ``path`` is replaced, not followed.

    Args:
        path: the final name; its folder is created if need be.
        write: receives a binary file open for writing, which cannot seek.

    Raises:
        OSError: the file cannot be written; the message says how much room it needs and how much
            there is.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_text(folder / "a.txt", "all of it")
        >>> (folder / "a.txt").read_bytes()
        b'all of it'
    """
    sink = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _create_temporary(path.parent)
        try:
            sink = _Sink(handle)
            write(cast("IO[bytes]", sink))
            if sink.error is not None:
                raise sink.error
            os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        _sync_folder(path.parent)
    except OSError as error:
        raise _explained(error, path, 0 if sink is None else sink.size) from error


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_atomically` for bytes."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """:func:`write_atomically` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


class _Sink(io.RawIOBase):
    """A file whose writes never fail; the first error is kept for the end.

    ``torch.save`` turns an exception in the middle of writing into a C++ report. And only at the end
    is it known how much room the file needs.

    Attributes:
        size: bytes written so far, those included that found no room.
        error: the first failure.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Always True."""
        return True

    def write(self, data: Any) -> int:
        """Take all of ``data``."""
        rest = memoryview(data).cast("B")
        count = len(rest)
        self.size += count
        try:
            while self.error is None and len(rest):
                rest = rest[os.write(self._handle, rest) :]
        except OSError as error:
            self.error = error
        return count


def _create_temporary(folder: Path) -> tuple[int, Path]:
    """An open new file of ours, locked as long as it is open."""
    while True:
        path = folder / _TEMPORARY.format(secrets.token_hex(8))
        try:
            # The kernel applies the umask, which no thread can read without setting it.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        _try_lock(handle, "flock")
        if os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)  # a process that starts took it for an orphan before it was locked


def remove_orphans(folder: Path) -> None:
    """Remove the temporary files that killed processes left in ``folder``."""
    for path in folder.glob(_TEMPORARY.format("*")):
        with suppress(OSError):
            handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                free = _try_lock(handle, "flock")
                if free is None:
                    free = time.time() - os.fstat(handle).st_mtime > _ABANDONED_SECONDS
                if free:
                    path.unlink()
            finally:
                os.close(handle)


def _try_lock(handle: int, kind: Literal["flock", "lockf"]) -> bool | None:
    """Lock an open file: False if somebody else has it, None where there are no such locks.

    A lock of ``flock`` belongs to the open file, and so to the children that this process forks as
    well; one of ``lockf`` belongs to this process alone.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    lock = fcntl.flock if kind == "flock" else fcntl.lockf
    try:
        lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk; file systems that cannot do that are left alone."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _explained(error: OSError, path: Path, size: int) -> OSError:
    """The same kind of error, with a message that names ``path`` and the room that it needs."""
    if error.errno is None:
        return error
    text = f"{os.strerror(error.errno)}: {path}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += f" needs {_megabytes(size)}, {_room(error.errno, path.parent)}"
    explained = type(error)(text)
    explained.errno = error.errno
    return explained


def _room(code: int, folder: Path) -> str:
    """What limits a file in ``folder``."""
    if code == errno.EFBIG and sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            return f"the limit on files (ulimit -f) is {_megabytes(limit)}"
    return f"{_megabytes(shutil.disk_usage(folder).free)} free"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def check_room(folder: Path, *sizes: int) -> None:
    """Make sure that files of these many bytes can be written to ``folder`` side by side.

    Where the system can, their room is really taken for a moment, so that quotas and limits count.

    Args:
        folder: an existing folder.
        *sizes: bytes of each file.

    Raises:
        OSError: the folder cannot be written to, or there is too little room.
    """
    made: list[tuple[int, Path]] = []
    try:
        for size in sizes:
            made.append(_create_temporary(folder))
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(made[-1][0], 0, size)
    except OSError as error:
        # Some network file systems cannot reserve room: the first write will tell.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            needed = max(sizes) if error.errno == errno.EFBIG else sum(sizes)
            raise _explained(error, folder, needed) from error
    finally:
        for handle, path in made:
            path.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder`` inside the context, and clean up after killed ones.

    The lock is a file in the folder that names host and process. The system releases it when the
    process dies, however that happens, so a stale one is no obstacle. On a file system without locks
    the file's content decides: a process of this host that is gone is no obstacle either. Threads of
    one process do not exclude each other.

    Args:
        folder: created if need be.

    Raises:
        FolderBusyError: another process has it.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with locked(folder):
        ...     (folder / ".fastsam-lock").exists()
        True
    """
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(path)
    except FolderBusyError:
        raise
    except OSError as error:
        raise _explained(error, path, 0) from error
    try:
        remove_orphans(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path) -> int:
    """The open lock file, which this process has now."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            free = _try_lock(handle, "lockf")
            owner = os.read(handle, 300).decode("utf-8", "replace").split()
            if free is False or (free is None and owner and not _is_gone(owner)):
                who = f"process {owner[1]} on {owner[0]}" if len(owner) == 2 else "another process"
                advice = "" if free is False else f"; if that process is gone, remove {path}"
                raise FolderBusyError(
                    f"{path.parent} is in use by {who}; wait for it, or choose another folder"
                    + advice
                )
            if _is_file_of(handle, path):  # else its last owner removed it a moment ago
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
                return handle
        except FolderBusyError:
            os.close(handle)
            raise
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(handle)
            raise
        os.close(handle)


def _is_gone(owner: list[str]) -> bool:
    """Return whether the process that a lock names is one of this host and no longer lives."""
    if len(owner) != 2 or owner[0] != socket.gethostname() or not owner[1].isdecimal():
        return False
    import psutil

    process = int(owner[1])
    try:
        return process == os.getpid() or not psutil.pid_exists(process)
    except OverflowError:  # a number that no process can have: the lock was not written by us
        return False


def _is_file_of(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def to_json(document: Mapping[str, Any]) -> str:
    """JSON text of ``document`` with a checksum, which :func:`from_json` verifies.

    Numbers that are not finite are written as ``NaN`` and ``Infinity``.

    Example:
        >>> from_json(to_json({"a": [1, 2.5]}))
        {'a': [1, 2.5]}
    """
    # As it will be read: tuples are lists there, and all keys are strings.
    plain = json.loads(json.dumps(document))
    return json.dumps({**plain, _CHECKSUM: _checksum(plain)}, indent=2) + "\n"


def from_json(text: str) -> dict[str, Any]:
    """The document of :func:`to_json`; text without a checksum, as older versions wrote, is accepted.

    Raises:
        ValueError: the text is no JSON object, or not what was written.
    """
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"a JSON object was expected, not {type(document).__name__}")
    written = document.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(document):
        raise ValueError("its checksum is wrong: the file was damaged or edited")
    return document


def _checksum(document: dict[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
