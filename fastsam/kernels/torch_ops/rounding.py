"""Stochastic rounding to 16 bits in PyTorch operations, with the bits of the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.kernels.torch_ops.philox import random_words

_PER_COUNTER = 8
"""Number of elements per counter: each uses 16 of its 128 bits."""


def round_at_random(value: Tensor, like: Tensor, squared_norm: Tensor, row: int) -> Tensor:
    """Round ``value`` to one of its two neighbors in a 16-bit dtype, the nearer with higher probability.

    Args:
        value: float32 tensor, dense in memory.
        like: a tensor with the shape, strides and dtype of the result.
        squared_norm: scalar whose bits, as float64, are the seed.
        row: row of the tensor in its table, which is the index of its random stream.
    """
    count = like.numel()
    flat = value.as_strided(
        (count,), (1,)
    )  # random bits go by the offset in memory, not by the index
    words = random_words(
        _seed(squared_norm), step=0, stream=row, counters=-(-count // _PER_COUNTER)
    )
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    random = halves.flatten()[:count].to(torch.int32)
    bits = flat.view(torch.int32)
    rounded = (_bfloat16 if like.dtype == torch.bfloat16 else _float16)(bits, flat, random)
    result = torch.empty_like(like)
    result.as_strided((count,), (1,)).copy_(rounded.to(torch.int16).view(like.dtype))
    return result


def _seed(squared_norm: Tensor) -> Tensor:
    """Return the bits of ``squared_norm``, a number >= 0, as a float64: int64 scalar."""
    if squared_norm.dtype == torch.float64:
        return squared_norm.view(torch.int64)
    bits = squared_norm.view(torch.int32).to(torch.int64)
    # Convert without float64, which the device may lack: the exponent's bias grows from 127 to 1023 and the
    # fraction from 23 to 52 bits. A subnormal float32 gives other bits, which are as good a seed.
    return torch.where(bits == 0, bits, (bits << 29) + ((1023 - 127) << 52))


def _bfloat16(bits: Tensor, value: Tensor, random: Tensor) -> Tensor:
    """Return the 16 result bits in an int32. A carry from the random bits rounds away from zero."""
    return torch.where(value.isnan(), 0x7FC0, (bits + random) >> 16)


def _float16(bits: Tensor, value: Tensor, random: Tensor) -> Tensor:
    magnitude = bits & 0x7FFFFFFF
    # Subnormals of float16 are multiples of 2^-24. Fixed point with 16 more bits has the fraction between two
    # of them, to which the random bits are added.
    is_subnormal = magnitude < 0x38800000
    scaled = torch.where(is_subnormal, value.abs(), 0.0) * 2.0**40
    subnormal = (scaled.to(torch.int32) + random) >> 16
    normal = (magnitude - (112 << 23) + (random >> 3)) >> 13
    finite = torch.where(is_subnormal, subnormal, normal)
    special = torch.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
    result = torch.where(magnitude >= 0x47800000, special, finite)
    return result | ((bits >> 16) & 0x8000)
