"""Free memory of devices, and the part of it that a run may use."""

from __future__ import annotations

from pathlib import Path

import torch

MARGIN = 0.8
"""Fraction of the free memory that a run may use."""


def readable(size: float) -> str:
    """Format a number of bytes in the largest unit with a value of at least 0.1: ``"1.50 GiB"``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= 0.1 * scale:
            return f"{size / scale:.2f} {unit}"
    return f"{int(size)} bytes"


def available_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None if it is neither a CPU nor a CUDA device.

    On the CPU, the limit of the process's control group is taken into account.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    if device.type != "cpu":
        return None
    import psutil

    available = int(psutil.virtual_memory().available)
    allowed = _free_in_group()
    return available if allowed is None else min(available, allowed)


def plan_bytes(device: torch.device, limit: int | None) -> int | None:
    """Return the bytes that a run may use: ``limit``, or by default 80 % of the free memory."""
    if limit is not None:
        return limit
    free = available_bytes(device)
    return None if free is None else int(MARGIN * free)


def _free_in_group() -> int | None:
    """Return the bytes left in the Linux control group (version 2), or None without a limit.

    psutil reports the memory of the machine, even in a container that may use only a part of it. The
    inactive file cache counts as free.
    """
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        details = dict(
            line.split() for line in (group / "memory.stat").read_text().splitlines() if line
        )
        return int(limit) - used + int(details.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
