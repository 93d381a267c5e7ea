"""Copies to a device that the host need not wait for."""

from __future__ import annotations

import torch


def need_not_wait(device: torch.device) -> bool:
    """Return whether a copy to ``device`` may be asynchronous.

    On CUDA the stream orders the copy before the kernels that read it. CPU kernels run at once, so the copy
    must be complete. On other devices the source memory might be freed before an asynchronous copy reads it.
    """
    return device.type == "cuda"
