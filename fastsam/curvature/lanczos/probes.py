"""Start vectors of Lanczos runs."""

from __future__ import annotations

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
    for row, index in zip(probes, indices, strict=True):
        state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        draw = torch.randn(dimension, generator=generator, dtype=dtype)
        row.copy_(draw / draw.double().norm().to(dtype))
    return probes
