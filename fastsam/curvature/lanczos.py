"""Batched Lanczos: all probes advance together as the rows of one block."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.curvature.basis import allocated_basis, basis_bytes
from fastsam.curvature.checkpoint import LanczosCheckpoint, Progress
from fastsam.curvature.checks import check_count, check_number
from fastsam.curvature.monitor import Monitor, Symmetry
from fastsam.curvature.operators import Operator, checked_product
from fastsam.kernels.backends import backend_of, sum_dtype
from fastsam.kernels.lanczos import Recurrence, orthogonalize
from fastsam.progress import ProgressBar

Reorthogonalize = Literal["full", "none"]


@dataclass(frozen=True, kw_only=True)
class LanczosSettings:
    """Settings of a run: all options of :func:`fastsam.curvature.operator_spectrum`.

    Attributes:
        steps: number of Lanczos steps; never more than n.
        probes: number of independent start vectors, advanced together.
        seed: seed of the probes.
        probe_indices: indices of the seed's probes to run. Default None: the first ``probes``. Runs
            with different indices can be merged.
        reorthogonalize: ``"full"`` orthogonalizes every vector against all earlier ones, twice.
            ``"none"`` orthogonalizes only against the last two. It keeps three vectors in memory
            instead of all; the extremes remain accurate, but converged eigenvalues occur repeatedly.
        tolerance: stop early when the Ritz residuals of both extremes are at most ``tolerance *
            ||T||``, checked at every fifth step. Default None: make all steps.
        basis: location of the basis: ``"device"``, ``"host"`` (main memory), or a folder for a
            memory-mapped file; see :func:`fastsam.curvature.basis.allocated_basis`. It has the
            operator's dtype. A basis in bfloat16 was rejected: the extremes of two spectra of
            dimension 1000 had errors of up to 5e-5 of the norm at Ritz residuals of 1e-20, and the
            bound that always holds, 2^-8, is too large to be useful.
        checkpoint: folder for checkpoints. A run found there is resumed, with bitwise equal results.
        checkpoint_interval: seconds between two checkpoints; 0 writes one after every step.
        writes_checkpoint: set to False on ranks that must not write.
        memory_limit: bytes that the run may use on the device of the basis. Default None: 80 % of
            free memory.
        verify_symmetry: raise an error if T shows that the operator is not symmetric.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
        description: label of the progress bar.
    """

    steps: int = 80
    probes: int = 1
    seed: int = 0
    probe_indices: range | None = None
    reorthogonalize: Reorthogonalize = "full"
    tolerance: float | None = None
    basis: str | Path = "device"
    checkpoint: str | Path | None = None
    checkpoint_interval: float = 60.0
    writes_checkpoint: bool = True
    memory_limit: int | None = None
    verify_symmetry: bool = True
    progress: bool = True
    description: str = "Lanczos"

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for invalid options, before the run begins."""
        check_count("steps", self.steps)
        if self.probe_indices is None:
            check_count("probes", self.probes)
        elif not isinstance(self.probe_indices, range):
            raise TypeError(
                f"probe_indices must be a range, such as range(4, 8), got {self.probe_indices!r}"
            )
        elif len(self.probe_indices) < 1 or min(self.probe_indices) < 0:
            raise ValueError(
                "probe_indices must have at least one index and none below 0, got "
                f"{self.probe_indices}"
            )
        check_count("seed", self.seed, least=0)
        if self.memory_limit is not None:
            check_count("memory_limit", self.memory_limit, unit="bytes")
        interval = self.checkpoint_interval
        check_number("checkpoint_interval", interval, below=math.inf, unit="seconds")
        if self.reorthogonalize not in get_args(Reorthogonalize):
            raise ValueError(
                f"reorthogonalize must be 'full' or 'none', got {self.reorthogonalize!r}"
            )
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, below=1)
        if not isinstance(self.basis, Path) and self.basis not in ("device", "host"):
            raise ValueError(
                f"basis must be 'device', 'host' or a pathlib.Path of a folder, got {self.basis!r}"
            )

    @property
    def indices(self) -> range:
        """Indices of the probes to run."""
        return range(self.probes) if self.probe_indices is None else self.probe_indices

    def basis_bytes(self, operator: Operator) -> int:
        """Return the size of the basis in bytes."""
        steps = min(self.steps, operator.shape[0])
        rows = min(steps, 3) if self.reorthogonalize == "none" else steps
        return basis_bytes(len(self.indices), rows, operator.shape[0], dtype=operator.dtype)


@dataclass(frozen=True, eq=False)
class LanczosRun:
    """The tridiagonal matrices T of a finished run, on the host, and the basis.

    Attributes:
        alpha: diagonals, float64 ``[probes, steps]``.
        beta: off-diagonals, float64 ``[probes, steps]``; ``beta[:, j]`` couples j and j + 1, and
            ``beta[:, order - 1]`` is the norm of the residual, 0 if the Krylov space is exhausted.
        order: order of each probe's T, int64 ``[probes]``.
        basis: ``[probes, steps, n]``, valid inside the context of :func:`lanczos`; None if it was
            not kept.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    order: NDArray[np.int64]
    basis: Tensor | None


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


@contextlib.contextmanager
def lanczos(
    operator: Operator, settings: LanczosSettings, *, identity: Mapping[str, Any]
) -> Iterator[LanczosRun]:
    """Run Lanczos from random unit vectors. The basis is freed when the context ends.

    Args:
        operator: symmetric operator of dimension n.
        settings: settings of the run.
        identity: values that must equal those of a checkpoint to resume it, besides the settings.

    Raises:
        ValueError: the basis does not fit in memory, the checkpoint belongs to another run, or the
            operator is not symmetric.
        OSError: the disk has no room for the file of the basis.
        FloatingPointError: a product contains NaN or infinity.
    """
    dimension = operator.shape[0]
    steps = min(settings.steps, dimension)
    probes = len(settings.indices)
    short = settings.reorthogonalize == "none"
    rows = min(steps, 3) if short else steps
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            ProgressBar(total=steps, description=settings.description, enabled=settings.progress)
        )
        basis = stack.enter_context(
            allocated_basis(
                probes,
                rows,
                dimension,
                dtype=operator.dtype,
                device=operator.device,
                place=settings.basis,
                memory_limit=settings.memory_limit,
            )
        )
        recurrence = Recurrence.start(
            probes, steps, device=basis.device, dtype=sum_dtype(basis.device, basis.dtype)
        )
        image = torch.empty(probes, dimension, dtype=basis.dtype, device=basis.device)
        basis[:, 0] = sphere_probes(
            dimension, settings.indices, seed=settings.seed, dtype=basis.dtype, device=basis.device
        )
        # PyTorch operations round unlike the kernels, so a run must not be resumed with the other.
        if backend_of(basis.device) == "torch":
            identity = {**identity, "backend": "torch"}
        checkpoint = _open_checkpoint(settings, identity, dimension)
        earlier = Progress()
        if checkpoint is not None:
            earlier = checkpoint.restore(basis, recurrence, all_rows=not short)
            bar.update(earlier.done)
        eps = torch.finfo(operator.dtype).eps
        symmetry = Symmetry(recurrence, eps=eps) if settings.verify_symmetry else None
        monitor = Monitor(recurrence, symmetry, tolerance=settings.tolerance, start=earlier)
        for step in range(earlier.done, earlier.done if earlier.ended else steps):
            # Row j of the basis is vector j; without re-orthogonalization only the last two are kept.
            current = min(step, 1) if short else step
            product = operator.matmat(basis[:, current].to(operator.device))
            # Copy: the product may be its argument, a view, or memory that the operator reuses, and
            # orthogonalize overwrites it.
            image.copy_(checked_product(product, image))
            if symmetry is not None and step and step & (step - 1) == 0:
                symmetry.look(step, basis[:, current - 1], image)
            last = step == steps - 1
            orthogonalize(
                basis[:, : current + 1],
                image,
                None if last else basis[:, current + 1],
                recurrence,
                step=step,
                eps=eps,
            )
            if short and step > 0 and not last:
                basis[:, :2] = basis[:, 1:3].clone()
            bar.update(note=monitor.note())
            monitor.record(step)
            leaving = last or monitor.leaves(step)
            if checkpoint is not None and checkpoint.writes and (leaving or checkpoint.due()):
                # Check every step before it is written, so that a resumed run ends at the same step.
                state = monitor.settle()
                ended = last or monitor.ended
                offset = step if short else 0
                needed = () if short and ended else range(offset, min(step + 2, steps))
                checkpoint.write(
                    {number: basis[:, number - offset] for number in needed},
                    state.recurrence,
                    Progress(done=state.step + 1, ended=ended),
                )
            if leaving:
                break
        state = monitor.settle()
        yield LanczosRun(
            alpha=state.recurrence.alpha.double().numpy(),
            beta=state.recurrence.beta.double().numpy(),
            order=state.recurrence.steps_taken.numpy(),
            basis=None if short else basis,
        )


def _open_checkpoint(
    settings: LanczosSettings, identity: Mapping[str, Any], dimension: int
) -> LanczosCheckpoint | None:
    if settings.checkpoint is None:
        return None
    own = {
        "dimension": dimension,
        "steps": min(settings.steps, dimension),
        "probes": list(settings.indices),
        "seed": settings.seed,
        "reorthogonalize": settings.reorthogonalize,
        "tolerance": settings.tolerance,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return LanczosCheckpoint(
        Path(settings.checkpoint),
        {**own, **identity},
        interval=settings.checkpoint_interval,
        writes=settings.writes_checkpoint,
    )
