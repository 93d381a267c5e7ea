"""Reference implementations of the native kernels in plain PyTorch.

Each function computes the same as the native call of its name. The kernel tests compare with them; the
library never calls them. They favor clarity over speed, run on any device and dtype, and accumulate sums in
float64, as the native kernels do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsam.kernels.lanczos import Recurrence

BREAKDOWN_FACTOR = 64.0
"""A probe ends at ``beta <= BREAKDOWN_FACTOR * eps * ||T||``: the residual is then rounding noise."""

PER_COUNTER = 4
"""Number of normal samples from one Philox counter."""

ROUNDED_PER_COUNTER = 8
"""Number of elements that are rounded stochastically with one Philox counter, 16 bits each."""


def orthogonalize(
    rows: Tensor,
    vector: Tensor,
    successor: Tensor | None,
    recurrence: Recurrence,
    *,
    step: int,
    eps: float,
) -> None:
    """Run two Gram-Schmidt passes of ``vector`` against ``rows`` and one step of the Lanczos recurrence.

    See :func:`fastsam.kernels.lanczos.orthogonalize` for the arguments.
    """
    basis = rows.double()  # [probes, count, n]
    active = recurrence.active.bool()
    first = torch.einsum("pkn,pn->pk", basis, vector.double())
    vector -= torch.einsum("pkn,pk->pn", basis, first).to(vector.dtype)
    second = torch.einsum("pkn,pn->pk", basis, vector.double())
    vector -= torch.einsum("pkn,pk->pn", basis, second).to(vector.dtype)
    alpha = first[:, -1] + second[:, -1]
    beta = vector.double().square().sum(dim=1).sqrt()
    previous = recurrence.beta[:, step - 1] if step > 0 else torch.zeros_like(beta)

    # The largest absolute row sum of T bounds its spectral norm from above.
    bound = torch.maximum(recurrence.bound, alpha.abs() + previous + beta)
    recurrence.bound.copy_(torch.where(active, bound, recurrence.bound))
    continues = active & ~(beta <= BREAKDOWN_FACTOR * eps * recurrence.bound)
    zero = torch.zeros_like(beta)
    recurrence.alpha[:, step] = torch.where(active, alpha, zero)
    recurrence.beta[:, step] = torch.where(continues, beta, zero)
    recurrence.steps_taken += active.to(recurrence.steps_taken.dtype)
    recurrence.active.copy_(continues)
    if successor is not None:
        # Select instead of multiplying by 0: a probe after a breakdown may have inf or NaN.
        quotient = vector.double() / torch.where(continues, beta, torch.ones_like(beta))[:, None]
        successor.copy_(torch.where(continues[:, None], quotient, torch.zeros_like(quotient)))


def squared_norm(gradient: Tensor, weight: Tensor, *, adaptive: bool, eta: float) -> Tensor:
    """Return ``||T_w g||^2`` of one tensor, float64 scalar; T_w is ``|w| + eta`` or 1."""
    scaled = gradient.double()
    if adaptive:
        scaled = scaled * (weight.double().abs() + eta)
    return scaled.square().sum()


def perturb(
    weight: Tensor, gradient: Tensor, *, norm: float, rho: float, adaptive: bool, eta: float
) -> Tensor:
    """Return ``w + T_w^2 g rho / (norm + 1e-12)``, or w if the norm or the factor is not finite."""
    scale = rho / (norm + 1e-12)
    if not (math.isfinite(scale) and math.isfinite(norm)):
        return weight.clone()
    normalization = weight.double().abs() + eta if adaptive else 1.0
    return (weight.double() + normalization**2 * gradient.double() * scale).to(weight.dtype)


def rounding_bits(squared_norm: float, row: int, count: int) -> Tensor:
    """Return the random bits for stochastic rounding of a weight: int64 ``[count]`` in [0, 2^16)."""
    blocks = np.arange(-(-count // ROUNDED_PER_COUNTER), dtype=np.uint64)
    counters = np.zeros((blocks.size, 4), dtype=np.uint32)
    counters[:, 0] = blocks & np.uint64(0xFFFFFFFF)
    counters[:, 1] = blocks >> np.uint64(32)
    counters[:, 2] = row
    words = philox(counters, int(np.float64(squared_norm).view(np.uint64)))
    return torch.from_numpy(words.astype("<u4").view("<u2").reshape(-1)[:count].astype(np.int64))


def round_at_random(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``value`` (float64, finite) to one of its two neighbors in ``dtype``.

    The neighbor away from zero is chosen if ``bits / 2^16 + f >= 1``, where f in [0, 1] is the position of
    ``value`` between the neighbor toward zero and the one away from it.
    """
    nearest = value.to(dtype)
    away = torch.where(nearest.double().abs() >= value.abs(), nearest, _next_away(nearest))
    towards = torch.where(nearest.double().abs() <= value.abs(), nearest, _next_towards(nearest))
    gap = (away.double() - towards.double()).abs()
    gone = torch.where(gap > 0, (value - towards.double()).abs() / gap, torch.zeros_like(gap))
    return torch.where(gone + bits / 2.0**16 >= 1.0, away, towards)


def _next_away(value: Tensor) -> Tensor:
    """Return the neighbor farther from zero: the bits of a float, read as an integer, grow with its size."""
    return (value.view(torch.int16) + 1).view(value.dtype)


def _next_towards(value: Tensor) -> Tensor:
    return (value.view(torch.int16) - 1).view(value.dtype)


def update_sgd(
    weight: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor,
    *,
    first: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> tuple[Tensor, Tensor]:
    """Make an update of ``torch.optim.SGD``; return the new weight and the new momentum buffer."""
    w, buffer = weight.double(), momentum_buffer.double()
    direction = (-1.0 if maximize else 1.0) * gradient.double() + weight_decay * w
    if momentum != 0.0:
        buffer = direction if first else momentum * buffer + (1.0 - dampening) * direction
        direction = direction + momentum * buffer if nesterov else buffer
    return (w - lr * direction).to(weight.dtype), buffer.to(weight.dtype)


def update_adam(
    weight: Tensor,
    gradient: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Make update ``step`` (from 1) of ``torch.optim.Adam`` or ``AdamW``; return new weight and moments."""
    w = weight.double()
    first, second, maximum = (moment.double() for moment in state)
    direction = (-1.0 if maximize else 1.0) * gradient.double()
    if decoupled:
        w = w * (1.0 - lr * weight_decay)
    else:
        direction = direction + weight_decay * w
    first = beta1 * first + (1.0 - beta1) * direction
    second = beta2 * second + (1.0 - beta2) * direction.square()
    maximum = torch.maximum(maximum, second) if amsgrad else maximum
    root = ((maximum if amsgrad else second) / (1.0 - beta2**step)).sqrt()
    w = w - lr * first / (1.0 - beta1**step) / (root + eps)
    moments = (first.to(weight.dtype), second.to(weight.dtype), maximum.to(weight.dtype))
    return w.to(weight.dtype), moments


def philox(counters: np.ndarray, key: int) -> np.ndarray:
    """Apply Philox4x32-10 (Salmon et al. 2011) to uint32 counters ``[n, 4]`` with a 64-bit key."""
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    mask = np.uint64(0xFFFFFFFF)
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first = np.uint64(0xD2511F53) * c[0]
        second = np.uint64(0xCD9E8D57) * c[2]
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(keys[0]),
            second & mask,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(keys[1]),
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1).astype(np.uint32)


def standard_normal(seed: int, step: int, stream: int, count: int) -> Tensor:
    """Return the standard normal samples of the kernels, float64 ``[count]``: Philox and Box-Muller."""
    blocks = np.arange(-(-count // PER_COUNTER), dtype=np.uint64)
    counters = np.empty((blocks.size, 4), dtype=np.uint32)
    counters[:, 0] = blocks & np.uint64(0xFFFFFFFF)
    counters[:, 1] = blocks >> np.uint64(32)
    counters[:, 2], counters[:, 3] = stream, step
    bits = philox(counters, seed).astype(np.float64)
    # The kernels convert the integers to float32, which rounds those above 2^24; do the same here.
    uniform = (bits[:, 0::2].astype(np.float32) + np.float32(1)).astype(np.float64) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(uniform))
    angle = 2.0 * np.pi * (bits[:, 1::2] * 2.0**-32 - 0.125)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return torch.from_numpy(pairs.reshape(-1)[:count].copy())
