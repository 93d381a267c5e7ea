"""Philox4x32-10 (Salmon et al. 2011) on int64 tensors with 32-bit values.

The bits equal those of the native kernels. Products are computed from 16-bit halves, because the product of
two 32-bit numbers would overflow the signed int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def random_words(key: Tensor, *, step: Tensor | int, stream: int, counters: int) -> list[Tensor]:
    """Return the four words of the counters ``[0, counters)`` of a stream, int64 ``[counters]`` each.

    Args:
        key: int64 scalar on the device with the 64 bits of the seed.
        step: integer in [0, 2^32), or an int64 scalar on the device.
        stream: integer in [0, 2^32).
        counters: number of counters.
    """
    counter = torch.arange(counters, dtype=torch.int64, device=key.device)
    words = [
        counter & MASK,
        counter >> 32,
        torch.full_like(counter, stream),
        torch.zeros_like(counter) + step,
    ]
    low, high = key & MASK, (key >> 32) & MASK
    for _ in range(10):
        high0, low0 = _product(words[0], 0xD2511F53)
        high2, low2 = _product(words[2], 0xCD9E8D57)
        words = [high2 ^ words[1] ^ low, low2, high0 ^ words[3] ^ high, low0]
        low, high = (low + 0x9E3779B9) & MASK, (high + 0xBB67AE85) & MASK
    return words


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of a product of two 32-bit numbers."""
    lower = word * (factor & 0xFFFF)
    upper = word * (factor >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)
