"""Batched Lanczos: all probes advance together as the rows of one block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.curvature.lanczos.basis import allocated_basis
from fastsam.curvature.lanczos.checkpoint import LanczosCheckpoint, Progress
from fastsam.curvature.lanczos.monitor import Monitor
from fastsam.curvature.lanczos.options import LanczosOptions
from fastsam.curvature.lanczos.probes import sphere_probes
from fastsam.curvature.lanczos.resume import resume
from fastsam.curvature.lanczos.symmetry import Symmetry
from fastsam.curvature.operators.base import Operator, checked_product
from fastsam.distributed import World
from fastsam.kernels.backends import backend_of, sum_dtype
from fastsam.kernels.lanczos import Recurrence, orthogonalize
from fastsam.progress import ProgressBar
from fastsam.stopping import Stopped


@dataclass(frozen=True, eq=False)
class LanczosRun:
    """The tridiagonal matrices T of a finished run, on the host.

    Attributes:
        alpha: diagonals, float64 ``[probes, steps]``.
        beta: off-diagonals, float64 ``[probes, steps]``; ``beta[:, j]`` couples j and j + 1, and
            ``beta[:, order - 1]`` is the norm of the residual, 0 if the Krylov space is exhausted.
        order: order of each probe's T, int64 ``[probes]``.
        asymmetry: largest asymmetry of the products that the run has seen, relative to the operator's
            norm; 0 with ``verify_symmetry=False``.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    order: NDArray[np.int64]
    asymmetry: float


def lanczos(
    operator: Operator,
    options: LanczosOptions,
    *,
    identity: Mapping[str, Any],
    world: World = World(),  # noqa: B008 (frozen)
) -> LanczosRun:
    """Run Lanczos from random unit vectors.

    Args:
        operator: symmetric operator of dimension n.
        options: options of the run.
        identity: values that must equal those of a checkpoint to resume it, besides the options.
        world: ranks that compute each product together. Default: one process.

    Raises:
        ValueError: the basis does not fit in memory, the checkpoint belongs to another run, or the
            operator is not symmetric.
        OSError: the disk has no room for the file of the basis.
        FloatingPointError: a product contains NaN or infinity.
        Stopped: a signal stopped the run before its end; see :class:`LanczosOptions`.
    """
    dimension = operator.shape[0]
    steps = min(options.steps, dimension)
    probes = len(options.indices)
    short = options.reorthogonalize == "none"
    rows = min(steps, 3) if short else steps
    with ExitStack() as stack:
        bar = stack.enter_context(
            ProgressBar(total=steps, description=options.description, enabled=options.progress)
        )
        basis = stack.enter_context(
            allocated_basis(
                probes,
                rows,
                dimension,
                dtype=operator.dtype,
                device=operator.device,
                place=options.basis,
                memory_limit=options.memory_limit,
            )
        )
        recurrence = Recurrence.start(
            probes, steps, device=basis.device, dtype=sum_dtype(basis.device, basis.dtype)
        )
        image = torch.empty(probes, dimension, dtype=basis.dtype, device=basis.device)
        basis[:, 0] = sphere_probes(
            dimension, options.indices, seed=options.seed, dtype=basis.dtype, device=basis.device
        )
        # PyTorch operations round unlike the kernels, so a run must not be resumed with the other.
        if backend_of(basis.device) == "torch":
            identity = {**identity, "backend": "torch"}
        checkpoint = _open_checkpoint(options, identity, dimension)
        earlier = Progress()
        if checkpoint is not None:
            earlier = resume(checkpoint, operator, basis, recurrence, options, world=world)
            bar.update(earlier.done)
        eps = torch.finfo(operator.dtype).eps
        symmetry = None
        if options.verify_symmetry:
            symmetry = Symmetry(recurrence, eps=eps, earlier=earlier.asymmetry)
        monitor = Monitor(recurrence, symmetry, tolerance=options.tolerance, start=earlier)
        if options.stop is not None:
            stack.enter_context(options.stop.deferred())
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
            signal = None if options.stop is None else options.stop.signal
            now = leaving or signal is not None
            if checkpoint is not None and checkpoint.writes and (now or checkpoint.due()):
                # Check every step before it is written, so that a resumed run ends at the same step.
                state = monitor.settle()
                ended = last or monitor.ended
                offset = step if short else 0
                needed = () if ended else range(offset, min(step + 2, steps))
                checkpoint.write(
                    {number: basis[:, number - offset] for number in needed},
                    state.recurrence,
                    Progress(state.step + 1, ended, tuple(state.asymmetry.tolist())),
                )
            if leaving:
                break
            if signal is not None:
                raise Stopped(
                    f"stopped by {signal} after step {step + 1} of {steps}; "
                    + (_NOT_SAVED if checkpoint is None else _SAVED)
                )
        state = monitor.settle()
        return LanczosRun(
            alpha=state.recurrence.alpha.double().numpy(),
            beta=state.recurrence.beta.double().numpy(),
            order=state.recurrence.steps_taken.numpy(),
            asymmetry=float(state.asymmetry.max()),
        )


_SAVED = "to continue, make the same call or run the same command again"
_NOT_SAVED = "nothing was saved without checkpoint=DIR, or --out DIR on the command line"


def _open_checkpoint(
    options: LanczosOptions, identity: Mapping[str, Any], dimension: int
) -> LanczosCheckpoint | None:
    if options.checkpoint is None:
        return None
    own = {
        "dimension": dimension,
        "steps": min(options.steps, dimension),
        "probes": list(options.indices),
        "seed": options.seed,
        "reorthogonalize": options.reorthogonalize,
        "tolerance": options.tolerance,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return LanczosCheckpoint(
        Path(options.checkpoint),
        {**own, **identity},
        interval=options.checkpoint_interval,
        writes=options.writes_checkpoint,
    )
