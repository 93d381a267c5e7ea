"""Device and environment of a run."""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
import torch

from fastsam.kernels.backends import backend_of
from fastsam.longtail.errors import UsageError


def chosen_device(name: str) -> torch.device:
    """Return the device called ``name``.

    Raises:
        UsageError: if the name is not valid, or the device does not exist.
    """
    wrong = UsageError(f"unknown device {name!r}; valid: cpu, cuda, cuda:0, ...")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise wrong from error
    if device.type in ("mps", "xpu"):
        raise UsageError(
            f"device {device}: the trainer runs only on cpu and cuda (NVIDIA and AMD); SAM and spectra in "
            "your own code run on every device"
        )
    if device.type not in ("cpu", "cuda"):
        raise wrong
    if device.type == "cpu" and device.index:
        raise UsageError(
            f"device {device} does not exist; the CPU is one device, pass --device cpu"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {device} is not available: torch finds no usable NVIDIA GPU; pass --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device} does not exist: torch finds {torch.cuda.device_count()} GPU(s); pass a "
            f"device from cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    return device


def peak_memory(device: torch.device) -> float | None:
    """Return the largest memory of this process so far in MiB; None where the system does not say.

    It is the memory that PyTorch allocated on a GPU, and the resident memory of the process on a CPU.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, number of threads, device and kernel backend, as recorded in results."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "kernels": backend_of(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
