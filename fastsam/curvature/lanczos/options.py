"""Options of a Lanczos run, documented once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

from fastsam.curvature.checks import check_count, check_number
from fastsam.curvature.lanczos.basis import basis_bytes, check_place
from fastsam.curvature.operators.base import Operator
from fastsam.stopping import StopRequest

Reorthogonalize = Literal["full", "none"]


@dataclass(frozen=True, kw_only=True)
class LanczosOptions:
    """Options of a Lanczos run.

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
        basis: location of the basis: ``"device"``, ``"host"`` (main memory), or the path of a folder
            for a memory-mapped file; see :func:`fastsam.curvature.lanczos.basis.allocated_basis`. It has the
            operator's dtype. A basis in bfloat16 was rejected: the extremes of two spectra of
            dimension 1000 had errors of up to 5e-5 of the norm at Ritz residuals of 1e-20, and the
            bound that always holds, 2^-8, is too large to be useful.
        checkpoint: folder for checkpoints. A run found there is resumed, with bitwise equal results.
            One product verifies first that the run is of the same operator.
        checkpoint_interval: seconds between two checkpoints; 0 writes one after every step.
        memory_limit: bytes that the run may use on the device of the basis. Default None: 80 % of
            free memory.
        verify_symmetry: whether to raise an error if T shows that the operator is not symmetric.
        writes_checkpoint: set to False on ranks that must not write.
        stop: from :func:`fastsam.stopping.stop_signals`: after a signal the run finishes its step, writes
            the checkpoint, and raises :class:`fastsam.stopping.Stopped`. Default None: signals keep their
            meaning.
        progress: whether to show progress: a bar on a terminal, one line per minute elsewhere.
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
    memory_limit: int | None = None
    verify_symmetry: bool = True
    writes_checkpoint: bool = True
    stop: StopRequest | None = None
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
        check_place(self.basis)

    @property
    def indices(self) -> range:
        """Indices of the probes to run."""
        return range(self.probes) if self.probe_indices is None else self.probe_indices

    def basis_bytes(self, operator: Operator) -> int:
        """Return the size of the basis in bytes."""
        steps = min(self.steps, operator.shape[0])
        rows = min(steps, 3) if self.reorthogonalize == "none" else steps
        return basis_bytes(len(self.indices), rows, operator.shape[0], dtype=operator.dtype)


class LanczosKeywords(TypedDict, total=False):
    """The same as keyword arguments, for type checkers; see :class:`LanczosOptions`."""

    steps: int
    probes: int
    seed: int
    probe_indices: range | None
    reorthogonalize: Reorthogonalize
    tolerance: float | None
    basis: str | Path
    checkpoint: str | Path | None
    checkpoint_interval: float
    memory_limit: int | None
    verify_symmetry: bool
    writes_checkpoint: bool
    stop: StopRequest | None
    progress: bool
    description: str
