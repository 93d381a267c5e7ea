"""Batched Lanczos: all probes advance together as the rows of one block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.curvature.operators import Operator
from fastsam.kernels.lanczos import Recurrence, orthogonalize
from fastsam.progress import ProgressBar

REORTHOGONALIZE = ("full", "none")


@dataclass(frozen=True)
class Tridiagonal:
    """The tridiagonal matrices T of a finished run, on the host.

    Attributes:
        alpha: diagonals, float64 ``[probes, steps]``.
        beta: off-diagonals, float64 ``[probes, steps]``; ``beta[:, j]`` joins j and j + 1, and the
            last one in use measures the residual; 0 where the Krylov space was exhausted.
        order: int64 ``[probes]``; the order of each probe's T.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    order: NDArray[np.int64]


def sphere_probes(
    dimension: int,
    indices: range,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Start vectors, independent and uniform on the unit sphere: ``[len(indices), dimension]``.

    Probe i depends on ``(seed, i)`` alone, so runs may be split, extended and merged; the numbers
    are drawn on the CPU, so they are the same for every device.
    """
    probes = torch.empty(len(indices), dimension, dtype=dtype, device=device)
    for row, index in zip(probes, indices, strict=True):
        state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        draw = torch.randn(dimension, generator=generator, dtype=dtype)
        row.copy_(draw / draw.double().norm().to(dtype))
    return probes


def lanczos(
    operator: Operator,
    start: Tensor,
    *,
    steps: int,
    reorthogonalize: str = "full",
    progress: bool = True,
    description: str = "Lanczos",
) -> Tridiagonal:
    """Run ``steps`` Lanczos steps from every row of ``start``.

    Args:
        operator: symmetric operator of dimension n.
        start: unit vectors ``[probes, n]``.
        steps: at least 1 and at most n.
        reorthogonalize: ``"full"`` against all earlier vectors, twice; ``"none"`` against the last
            two only: little memory, extremes still right, but converged eigenvalues appear several
                times.
        progress: show a progress bar on a terminal.
        description: its label.

    Raises:
        ValueError: a bad argument.
        FloatingPointError: a product held NaN or infinity.
    """
    if reorthogonalize not in REORTHOGONALIZE:
        raise ValueError(
            f"reorthogonalize must be one of {REORTHOGONALIZE}, got {reorthogonalize!r}"
        )
    probes, dimension = start.shape
    if not 1 <= steps <= dimension:
        raise ValueError(f"steps must be between 1 and the dimension {dimension}, got {steps}")
    kept = steps if reorthogonalize == "full" else min(steps, 3)
    basis = torch.empty(probes, kept, dimension, dtype=start.dtype, device=start.device)
    basis[:, 0] = start
    recurrence = Recurrence.start(probes, steps, device=start.device)
    eps = torch.finfo(operator.dtype).eps
    with ProgressBar(total=steps, description=description, enabled=progress) as bar:
        for step in range(steps):
            current = step if reorthogonalize == "full" else min(step, 1)
            image = operator.matmat(basis[:, current])
            last = step == steps - 1
            orthogonalize(
                basis[:, : current + 1],
                image,
                None if last else basis[:, current + 1],
                recurrence,
                step=step,
                eps=eps,
            )
            if reorthogonalize == "none" and step > 0 and not last:
                basis[:, :2] = basis[:, 1:3].clone()
            bar.update()
            _refuse_nonfinite(recurrence, step)
            if not bool(recurrence.active.any()):
                break
    return Tridiagonal(
        alpha=recurrence.alpha.cpu().numpy(),
        beta=recurrence.beta.cpu().numpy(),
        order=recurrence.steps_taken.cpu().numpy(),
    )


def _refuse_nonfinite(recurrence: Recurrence, step: int) -> None:
    if not bool(torch.isfinite(recurrence.bound).all()):
        raise FloatingPointError(
            f"the operator's product held NaN or infinity at step {step + 1}; "
            "a larger dtype (dtype=torch.float64) may help if the model overflows"
        )
