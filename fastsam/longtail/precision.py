"""Precision of the passes of a run."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return a new autocast context for passes on ``device``; with ``float32`` it is disabled.

    Every pass of a training step needs a new context, because a context caches weights that then change.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
