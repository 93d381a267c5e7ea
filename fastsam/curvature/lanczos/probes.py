"""Random vectors: start vectors of Lanczos runs, and probes of estimators."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def sphere_probes(
    dimension: int,
    indices: range,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw start vectors, independent and uniform on the unit sphere: ``[len(indices), dimension]``.

    Probe i depends only on ``(seed, i)``, so runs can be split, extended and merged. The numbers are
    drawn on the CPU, so they are equal on every device.
    """
    probes = torch.empty(len(indices), dimension, dtype=dtype, device=device)
    for row, generator in zip(probes, _generators(seed, indices), strict=True):
        draw = torch.randn(dimension, generator=generator, dtype=dtype, device="cpu")
        row.copy_(draw / draw.double().norm().to(dtype))
    return probes


def sign_probes(
    dimension: int,
    indices: range,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw probes of independent random signs, ``[len(indices), dimension]``.

    Probe i depends only on ``(seed, i)``, as in :func:`sphere_probes`.
    """
    probes = torch.empty(len(indices), dimension, dtype=dtype, device=device)
    for row, generator in zip(probes, _generators(seed, indices), strict=True):
        row.copy_(torch.randint(2, (dimension,), generator=generator, device="cpu") * 2 - 1)
    return probes


def _generators(seed: int, indices: range) -> Iterator[torch.Generator]:
    """Yield an independent random generator for each probe."""
    for index in indices:
        state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        yield torch.Generator().manual_seed(int(state >> np.uint64(1)))
