"""Disk space: reserve it, and explain its lack."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path


def reserve(handle: int, size: int) -> bool:
    """Reserve disk space for an empty file, which is then filled with zeros.

    Args:
        handle: descriptor of the file, open for writing.
        size: bytes to reserve.

    Returns:
        False if the system or the file system cannot reserve space, as some network file systems; then
        only the writes show a lack of it.

    Raises:
        OSError: the space is lacking, or a quota or a limit on file sizes does not allow it.
    """
    if not hasattr(os, "posix_fallocate") or size == 0:
        return size == 0
    # A reservation that fails first takes all the free space, which other processes then lack for a moment.
    status = os.fstatvfs(handle)
    if size > status.f_bavail * status.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


def explained(error: OSError, path: Path, size: int) -> OSError:
    """Return an error of the same type whose message has ``path`` and, if space is lacking, the sizes.

    Args:
        error: error of a write.
        path: the file or folder that could not be written.
        size: bytes that were to be written.
    """
    if error.errno is None:
        return error
    text = f"{os.strerror(error.errno)}: {path}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += f" needs {_megabytes(size)}, {_room(error.errno, path.parent)}"
    found = type(error)(text)
    found.errno = error.errno
    return found


def _room(code: int, folder: Path) -> str:
    """Describe the limit on files in ``folder``: free space or ulimit."""
    if code == errno.EFBIG and sys.platform != "win32":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY:
            return f"the limit on files (ulimit -f) is {_megabytes(limit)}"
    return f"{_megabytes(shutil.disk_usage(folder).free)} free"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
