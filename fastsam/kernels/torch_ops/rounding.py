"""Stochastic rounding to 16 bits in PyTorch operations, with the bits of the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.kernels.torch_ops.philox import random_words

_PER_COUNTER = 8
"""Elements that draw from one counter: 16 of its 128 bits each."""


def round_at_random(value: Tensor, like: Tensor, squared_norm: Tensor, row: int) -> Tensor:
    """Return ``value`` rounded to one of its two neighbors of a 16-bit dtype, the nearer the likelier.

    Args:
        value: float32.
        like: a tensor of the shape, the strides and the dtype of the result.
        squared_norm: scalar whose bits, as float64, are the seed.
        row: the tensor's row in its table, which is the number of its stream.
    """
    count = like.numel()
    flat = value.as_strided((count,), (1,))  # places in memory count, in any order of dimensions
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
    """Return the bits of a number >= 0 as float64, int64 scalar; computed from those of a float32."""
    if squared_norm.dtype == torch.float64:
        return squared_norm.view(torch.int64)
    bits = squared_norm.view(torch.int32).to(torch.int64)
    # The exponent's bias grows from 127 to 1023, the fraction from 23 to 52 digits. 0 stays 0; a subnormal
    # number would be another float64, but any seed serves.
    return torch.where(bits == 0, bits, (bits << 29) + ((1023 - 127) << 52))


def _bfloat16(bits: Tensor, value: Tensor, random: Tensor) -> Tensor:
    """Return 16 bits in an int32: a carry of the random bits moves away from zero."""
    return torch.where(value.isnan(), 0x7FC0, (bits + random) >> 16)


def _float16(bits: Tensor, value: Tensor, random: Tensor) -> Tensor:
    magnitude = bits & 0x7FFFFFFF
    # A subnormal counts in units of 2^-24; 16 more bits of fixed point hold what is between two of them.
    is_subnormal = magnitude < 0x38800000
    scaled = torch.where(is_subnormal, value.abs(), 0.0) * 2.0**40
    subnormal = (scaled.to(torch.int32) + random) >> 16
    normal = (magnitude - (112 << 23) + (random >> 3)) >> 13
    finite = torch.where(is_subnormal, subnormal, normal)
    special = torch.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
    result = torch.where(magnitude >= 0x47800000, special, finite)
    return result | ((bits >> 16) & 0x8000)
