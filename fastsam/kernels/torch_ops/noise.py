"""Counter-based normal noise in PyTorch operations, equal to the native kernels' up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsam.kernels.table import TensorTable
from fastsam.kernels.torch_ops.parts import arithmetic
from fastsam.kernels.torch_ops.philox import MASK, random_words

_PER_COUNTER = 4


@torch.no_grad()
def add_noise(table: TensorTable, seed_and_step: Tensor) -> None:
    """Run :func:`fastsam.kernels.noise.add_noise` with the scales and streams in the table."""
    seed, step = seed_and_step.unbind()
    for weight, scale, stream in zip(
        table.weights, table.scales, table.column("stream"), strict=True
    ):
        count = weight.numel()
        flat = weight.detach().as_strided((count,), (1,), weight.storage_offset())
        z = _standard_normals(seed, step & MASK, stream, count)
        (wide,) = arithmetic([flat])
        noise = scale.to(wide.dtype)[:, None] * z.to(wide.dtype).view(scale.numel(), -1)
        flat.copy_(wide + noise.flatten())


def _standard_normals(seed: Tensor, step: Tensor, stream: int, count: int) -> Tensor:
    """Return standard normal samples, float32 ``[count]``: pairs of the Box-Muller transform."""
    words = random_words(seed, step=step, stream=stream, counters=-(-count // _PER_COUNTER))
    pairs = [z for each in (words[:2], words[2:]) for z in _box_muller(*each)]
    return torch.stack(pairs, dim=1).flatten()[:count]


def _box_muller(bits0: Tensor, bits1: Tensor) -> tuple[Tensor, Tensor]:
    uniform = (bits0.to(torch.float32) + 1.0) * 2.0**-32  # (0, 1]
    radius = (-2.0 * uniform.log()).clamp_min(0.0).sqrt()
    # The two top bits choose a quarter turn, the other bits an angle in [-1/8, 1/8) of a turn around it, as
    # in the native kernels. Sine and cosine of the whole angle follow by swaps and signs.
    quarter = bits1 >> 30
    angle = ((bits1 & 0x3FFFFFFF).to(torch.float32) * 2.0**-32 - 0.125) * (2.0 * math.pi)
    sine, cosine = angle.sin(), angle.cos()
    odd = (quarter & 1) != 0
    swapped_sine, swapped_cosine = torch.where(odd, cosine, sine), torch.where(odd, sine, cosine)
    first = torch.where(((quarter + 1) & 2) != 0, -swapped_cosine, swapped_cosine)
    second = torch.where((quarter & 2) != 0, -swapped_sine, swapped_sine)
    return radius * first, radius * second
