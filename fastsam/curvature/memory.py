"""How much memory there is, and early errors where it would not do."""

from __future__ import annotations

from pathlib import Path

import torch

MARGIN = 0.8
"""Share of the free memory that a run may plan with."""


def readable(size: float) -> str:
    """A number of bytes in the largest unit that leaves at least 0.1, such as ``"1.50 GiB"``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= 0.1 * scale:
            return f"{size / scale:.2f} {unit}"
    return f"{int(size)} bytes"


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, at most what a control group allows; None where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused)
    if device.type != "cpu":
        return None
    limits = [limit for limit in (_free_by_kernel(), _free_in_group()) if limit is not None]
    return min(limits, default=None)


def plan_bytes(device: torch.device, limit: int | None) -> int | None:
    """Bytes that a run may use: ``limit`` where given, else the margin of what is free."""
    if limit is not None:
        return limit
    free = available_bytes(device)
    return None if free is None else int(MARGIN * free)


def _free_by_kernel() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _free_in_group() -> int | None:
    """What Linux control groups (version 2) leave; the inactive file cache counts as free."""
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
