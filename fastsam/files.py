"""Atomic writes, locks of folders, and JSON with checksums."""

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

from fastsam.disk_space import explained, reserve

OWN_FILES = ".fastsam-"
"""Prefix of lock and temporary files, which are not part of a folder's content."""
_TEMPORARY = OWN_FILES + "{}.partial"
_LOCK = OWN_FILES + "lock"
_ABANDONED_SECONDS = 24 * 3600
"""Age at which a temporary file counts as an orphan on a file system without locks."""
_CHECKSUM = "sha256"


class FolderBusyError(OSError):
    """Raised if another process uses the folder."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace ``path`` atomically with the content that ``write`` writes.

    The content is written to a temporary file in the same folder, synced to disk and renamed; then
    the folder is synced. If anything fails, ``path`` is unchanged. The mode is 0o666 without the bits
    of the umask. A symbolic link at ``path`` is replaced, not followed.

    Args:
        path: the file; its folder is created if it does not exist.
        write: called with a binary file open for writing, which cannot seek.

    Raises:
        OSError: the file cannot be written. If space is lacking, the message has the required and
            the free space.

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
        raise explained(error, path, 0 if sink is None else sink.size) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes with :func:`write_atomically`."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with :func:`write_atomically`."""
    write_bytes(path, text.encode("utf-8"))


def duplicate(source: Path, target: Path) -> None:
    """Create or replace ``target`` atomically with the content of ``source``.

    It takes no disk space where the file system supports hard links.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = target.with_name(_TEMPORARY.format(secrets.token_hex(8)))
    try:
        os.link(source, temporary)
    except OSError:
        with source.open("rb") as file:
            write_atomically(target, lambda sink: shutil.copyfileobj(file, sink))
        return
    try:
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)  # a rename between two links of one file does nothing


class _Sink(io.RawIOBase):
    """A file whose writes never raise; the first error is stored.

    ``torch.save`` converts an exception raised during a write to an unclear C++ error. Moreover, the
    required space is known only after all writes.

    Attributes:
        size: number of bytes passed to ``write``, including those that could not be written.
        error: the first error, or None.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Write ``data``, unless an earlier write failed; return its number of bytes in any case."""
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
    """Create a temporary file, and return its handle, which holds a lock, and its path."""
    while True:
        path = folder / _TEMPORARY.format(secrets.token_hex(8))
        try:
            # The kernel applies the umask. Reading it here is not thread-safe: os.umask must set it.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        _try_lock(handle, "flock")
        if os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)  # another process removed it as an orphan before it was locked


def remove_orphans(folder: Path) -> None:
    """Remove temporary files of killed processes from ``folder``."""
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
    """Lock an open file; return False if another process holds the lock, None without lock support.

    A lock of ``flock`` belongs to the open file, which forked children share. A lock of ``lockf``
    belongs only to this process.
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
    """Sync a folder to disk after a rename, if the file system supports it."""
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


def check_room(folder: Path, *sizes: int) -> None:
    """Check that files of these sizes can be written to ``folder`` at the same time.

    If the system supports it, the space is reserved temporarily, so that quotas and limits apply.

    Args:
        folder: an existing folder.
        *sizes: size of each file in bytes.

    Raises:
        OSError: the folder cannot be written to, or has too little space.
    """
    made: list[tuple[int, Path]] = []
    try:
        for size in sizes:
            made.append(_create_temporary(folder))
            reserve(made[-1][0], size)
    except OSError as error:
        needed = max(sizes) if error.errno == errno.EFBIG else sum(sizes)
        raise explained(error, folder, needed) from error
    finally:
        for handle, path in made:
            path.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other processes inside the context, and clean up after killed ones.

    The lock is a file in the folder that contains host and process. The system releases it when the
    process ends in any way, so a stale file does not block others. On a file system without locks the
    content of the file is used: it does not block if its process ran on this host and has ended.
    Threads of one process do not exclude each other.

    Args:
        folder: the folder, created if it does not exist.

    Raises:
        FolderBusyError: another process holds the lock.
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
        handle = _acquire(path)
    except FolderBusyError:
        raise
    except OSError as error:
        raise explained(error, path, 0) from error
    try:
        remove_orphans(folder)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int:
    """Acquire the lock and return the handle of its open file."""
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
            if _is_file_of(handle, path):  # else its last owner has just removed it: try again
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
    """Return whether the process in a lock file ran on this host and has ended."""
    if len(owner) != 2 or owner[0] != socket.gethostname() or not owner[1].isdecimal():
        return False
    import psutil

    process = int(owner[1])
    try:
        return process == os.getpid() or not psutil.pid_exists(process)
    except OverflowError:  # not a valid process number: fastsam did not write this file
        return False


def _is_file_of(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def to_json(document: Mapping[str, Any]) -> str:
    """Serialize ``document`` to JSON with a checksum, which :func:`from_json` verifies.

    Numbers that are not finite are written as ``NaN`` and ``Infinity``.

    Example:
        >>> from_json(to_json({"a": [1, 2.5]}))
        {'a': [1, 2.5]}
    """
    # The checksum is that of the document as it will be read: with lists for tuples, and string keys.
    plain = json.loads(json.dumps(document))
    return json.dumps({**plain, _CHECKSUM: _checksum(plain)}, indent=2) + "\n"


def from_json(text: str) -> dict[str, Any]:
    """Parse the result of :func:`to_json`. Text of older versions, without a checksum, is accepted.

    Raises:
        ValueError: the text is not a JSON object, or its checksum is wrong.
    """
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object, got {type(document).__name__}")
    written = document.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(document):
        raise ValueError("its checksum is wrong: the file was damaged or edited")
    return document


def _checksum(document: dict[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
