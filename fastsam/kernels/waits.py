"""Operations that make the host wait for a GPU, as errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Let torch raise RuntimeError inside the context where an operation waits for the GPU.

    A CUDA graph cannot record such an operation. Try a function in this context before it is captured: a
    capture that fails midway leaves torch's allocator in a bad state.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch warns at the first use of this mode; the user's filters may turn that into an error.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
