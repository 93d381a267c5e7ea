"""Autocast's cache of 16-bit weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def clear_cache() -> None:
    """Clear autocast's cache, which is stale after kernels outside of torch wrote the weights."""
    torch.clear_autocast_cache()


@contextmanager
def weights_change() -> Iterator[None]:
    """Clear autocast's cache afterwards, because the body writes weights.

    Inside one autocast context, later passes would otherwise use the weights of the first pass.
    """
    try:
        yield
    finally:
        clear_cache()
