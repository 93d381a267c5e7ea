"""The machine a run uses: its device, and the record of it."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch

from fastsam.kernels.backends import backend_of
from fastsam.longtail.errors import UsageError


def chosen_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        UsageError: if there is none of that name.
    """
    wrong = UsageError(f"unknown device {name!r}; valid: cpu, cuda, cuda:0, ...")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise wrong from error
    if device.type not in ("cpu", "cuda"):
        raise wrong
    if device.type == "cpu" and device.index:
        raise UsageError(f"there is no {device}: the CPU is one device; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch finds no usable NVIDIA GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no {device}: torch finds {torch.cuda.device_count()} GPU(s)")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads, device and what runs its optimizer steps, for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "kernels": backend_of(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
