"""Batched Lanczos: all probes advance together as the rows of one block."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.curvature.checkpoint import STATE_ARRAYS, Checkpoint, Progress
from fastsam.curvature.checks import check_count, check_number
from fastsam.curvature.memory import plan_bytes, readable
from fastsam.curvature.operators import AsymmetryError, Operator, checked_product
from fastsam.kernels.lanczos import Recurrence, orthogonalize
from fastsam.progress import ProgressBar

REORTHOGONALIZE = ("full", "selective", "none")

HOST_LAG = 2
"""Steps by which the host's look at T is behind a GPU, so that the GPU never waits for the host."""

JUDGED_EVERY = 5
"""Steps between two looks at whether a run with a tolerance may end."""


@dataclass(frozen=True, kw_only=True)
class LanczosSettings:
    """How a run is made; every option of :func:`fastsam.curvature.operator_spectrum`.

    Attributes:
        steps: Lanczos steps; at most n are taken.
        probes: independent start vectors, advanced together.
        seed: of the probes.
        probe_indices: which probes of the seed; None for the first ``probes``. Runs with other
            indices can be merged.
        reorthogonalize: ``"full"``: against all earlier vectors, twice, at every step.
            ``"selective"``: only where Simon's estimate (Math. Comp. 42, 1984) of the lost
            orthogonality reaches the square root of the machine epsilon, which keeps T exact to
            rounding; on CUDA it reads one flag per step. ``"none"``: against the last two vectors;
            needs three vectors of memory, the extremes stay right, converged eigenvalues appear
            several times.
        tolerance: stop early once the Ritz residuals of both extremes are at most ``tolerance *
            ||T||``, judged at every fifth step; None takes all steps.
        basis: where the basis lives: ``"device"``, ``"host"`` (main memory), or a folder for a
            memory-mapped file. It has the operator's dtype: with a basis in bfloat16 the extremes of
            two spectra of dimension 1000 were off by up to 5e-5 of the norm where the Ritz
            residuals claimed 1e-20, and a bound that always holds, 2^-8, would be of no use.
        checkpoint: a folder in which the run is kept; a run found there is continued to the same
            bits.
        checkpoint_interval: seconds between two writes; 0 writes after every step.
        writes_checkpoint: False where another process has the same run and writes it.
        memory_limit: bytes the run may use on the device of the basis; None for 80 % of what is
            free.
        verify_symmetry: refuse an operator that is not symmetric, as far as T shows it.
        progress: show progress: a bar on a terminal, a line a minute elsewhere.
        description: its label.
    """

    steps: int = 80
    probes: int = 1
    seed: int = 0
    probe_indices: range | None = None
    reorthogonalize: str = "full"
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
        """Refuse bad options before anything happens."""
        check_count("steps", self.steps)
        if self.probe_indices is None:
            check_count("probes", self.probes)
        elif not isinstance(self.probe_indices, range):
            raise TypeError(
                f"probe_indices must be a range, such as range(4, 8), got {self.probe_indices!r}"
            )
        elif len(self.probe_indices) < 1 or min(self.probe_indices) < 0:
            raise ValueError(
                "probe_indices must hold at least one number, and none below 0, got "
                f"{self.probe_indices}"
            )
        check_count("seed", self.seed, least=0)
        if self.memory_limit is not None:
            check_count("memory_limit", self.memory_limit, unit="bytes")
        interval = self.checkpoint_interval
        check_number("checkpoint_interval", interval, below=math.inf, unit="seconds")
        if self.reorthogonalize not in REORTHOGONALIZE:
            raise ValueError(
                f"reorthogonalize must be one of {', '.join(REORTHOGONALIZE)}, "
                f"got {self.reorthogonalize!r}"
            )
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, below=1)
        if not isinstance(self.basis, Path) and self.basis not in ("device", "host"):
            raise ValueError(
                f"basis must be 'device', 'host' or a pathlib.Path of a folder, got {self.basis!r}"
            )

    @property
    def indices(self) -> range:
        """The probes to run."""
        return range(self.probes) if self.probe_indices is None else self.probe_indices

    def basis_bytes(self, operator: Operator) -> int:
        """Size of the basis."""
        steps = min(self.steps, operator.shape[0])
        rows = min(steps, 3) if self.reorthogonalize == "none" else steps
        return len(self.indices) * rows * _padded(operator.shape[0]) * operator.dtype.itemsize


@dataclass(frozen=True, eq=False)
class LanczosRun:
    """The tridiagonal matrices T of a finished run, on the host, and the basis while it is alive.

    Attributes:
        alpha: diagonals, float64 ``[probes, steps]``.
        beta: off-diagonals, float64 ``[probes, steps]``; ``beta[:, j]`` joins j and j + 1, and the
            last one in use measures the residual; 0 where the Krylov space was exhausted.
        order: int64 ``[probes]``; the order of each probe's T.
        basis: ``[probes, steps, n]``, or None where it was not kept.
        full_passes: steps of T at which all earlier vectors took part in the re-orthogonalisation,
            those before a resume too.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    order: NDArray[np.int64]
    basis: Tensor | None
    full_passes: int


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


@contextlib.contextmanager
def lanczos(
    operator: Operator, settings: LanczosSettings, *, identity: Mapping[str, Any]
) -> Iterator[LanczosRun]:
    """Run Lanczos from random unit vectors; the basis lives as long as the context.

    Args:
        operator: symmetric operator of dimension n.
        settings: how.
        identity: what a checkpoint must agree on, besides the settings.

    Raises:
        ValueError: the basis does not fit, the checkpoint is of another run, or the operator is not
            symmetric.
        FloatingPointError: a product held NaN or infinity.
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
        basis = stack.enter_context(_allocate(operator, settings, (probes, rows, dimension)))
        recurrence = Recurrence.start(probes, steps, device=basis.device)
        image = torch.empty(probes, dimension, dtype=basis.dtype, device=basis.device)
        basis[:, 0] = sphere_probes(
            dimension, settings.indices, seed=settings.seed, dtype=basis.dtype, device=basis.device
        )
        checkpoint = _open_checkpoint(settings, identity, dimension)
        earlier = Progress()
        if checkpoint is not None:
            earlier = checkpoint.restore(basis, recurrence, all_rows=not short)
            bar.update(earlier.done)
        eps = torch.finfo(operator.dtype).eps
        orthogonality = _Orthogonality(recurrence, dimension=dimension, eps=eps)
        if earlier.estimate is not None:
            orthogonality.load(earlier.estimate)
        symmetry = _Symmetry(recurrence, eps=eps) if settings.verify_symmetry else None
        monitor = _Monitor(recurrence, symmetry, tolerance=settings.tolerance, start=earlier)
        full_passes = earlier.full_passes
        for step in range(earlier.done, earlier.done if earlier.ended else steps):
            # Rows are numbered by step, or, without re-orthogonalisation, the last two are kept.
            current = min(step, 1) if short else step
            product = operator.matmat(basis[:, current].to(operator.device))
            # A copy: the product may be the argument, a view, or memory of the operator's own.
            image.copy_(checked_product(product, image))
            if symmetry is not None and step and step & (step - 1) == 0:
                symmetry.look(step, basis[:, current - 1], image)
            everything = settings.reorthogonalize == "full" or (
                settings.reorthogonalize == "selective" and orthogonality.lost()
            )
            full_passes += everything
            first = 0 if everything else max(0, current - 1)
            last = step == steps - 1
            orthogonalize(
                basis[:, first : current + 1],
                image,
                None if last else basis[:, current + 1],
                recurrence,
                step=step,
                eps=eps,
            )
            if short and step > 0 and not last:
                basis[:, :2] = basis[:, 1:3].clone()
            if settings.reorthogonalize == "selective":
                orthogonality.advance(step, everything=everything)
            bar.update(note=monitor.note())
            monitor.record(step, full_passes)
            leaving = last or monitor.leaves(step)
            if checkpoint is not None and checkpoint.writes and (leaving or checkpoint.due()):
                # What is on disk has been judged: a resumed run ends where this one would.
                state = monitor.settle()
                ended = last or monitor.ended
                offset = step if short else 0
                needed = () if short and ended else range(offset, min(step + 2, steps))
                checkpoint.write(
                    {number: basis[:, number - offset] for number in needed},
                    state.recurrence,
                    Progress(
                        done=state.step + 1,
                        ended=ended,
                        full_passes=state.full_passes,
                        estimate=orthogonality.state
                        if settings.reorthogonalize == "selective"
                        else None,
                    ),
                )
            if leaving:
                break
        state = monitor.settle()
        yield LanczosRun(
            alpha=state.recurrence.alpha.numpy(),
            beta=state.recurrence.beta.numpy(),
            order=state.recurrence.steps_taken.numpy(),
            basis=None if short else basis,
            full_passes=state.full_passes,
        )


@contextlib.contextmanager
def _allocate(
    operator: Operator, settings: LanczosSettings, shape: tuple[int, int, int]
) -> Iterator[Tensor]:
    size = settings.basis_bytes(operator)
    probes, rows, dimension = shape
    padded = (probes, rows, _padded(dimension))
    if isinstance(settings.basis, Path):
        settings.basis.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=settings.basis, suffix=".basis") as file:
            file.truncate(size)
            yield torch.from_file(
                file.name, shared=True, size=math.prod(padded), dtype=operator.dtype
            ).view(padded)[..., :dimension]
        return
    device = operator.device if settings.basis == "device" else torch.device("cpu")
    limit = plan_bytes(device, settings.memory_limit)
    if limit is not None and size > limit:
        raise ValueError(
            f"the Lanczos basis needs {readable(size)} on {device}, {readable(limit)} "
            "may be used: "
            "take fewer steps or probes, basis='host', basis=pathlib.Path(folder), or "
            "reorthogonalize='none'"
        )
    yield torch.empty(padded, dtype=operator.dtype, device=device)[..., :dimension]


def _padded(dimension: int) -> int:
    """Elements between two basis rows: every row begins at a multiple of 64 bytes or more."""
    return -(-dimension // 16) * 16


def _open_checkpoint(
    settings: LanczosSettings, identity: Mapping[str, Any], dimension: int
) -> Checkpoint | None:
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
    return Checkpoint(
        Path(settings.checkpoint),
        {**own, **identity},
        interval=settings.checkpoint_interval,
        writes=settings.writes_checkpoint,
    )


def tridiagonal(alpha: NDArray[np.float64], beta: NDArray[np.float64]) -> NDArray[np.float64]:
    """The matrix T ``[order, order]`` of its diagonal and its off-diagonal."""
    off = beta[: len(alpha) - 1]
    return np.diag(alpha) + np.diag(off, 1) + np.diag(off, -1)


class _Orthogonality:
    """Simon's estimate of ``q_j . q_k`` for the last two j, ``[probes, steps + 1]`` each.

    A step orthogonalised against everything resets the estimate to the machine epsilon; two such
    steps in a row are needed, since the recurrence has two terms.
    """

    def __init__(self, recurrence: Recurrence, *, dimension: int, eps: float) -> None:
        probes, steps = recurrence.alpha.shape
        self._recurrence = recurrence
        self._floor = eps * math.sqrt(dimension)
        self._eps = eps
        self._before = torch.zeros(
            probes, steps + 1, dtype=torch.float64, device=recurrence.alpha.device
        )
        self._now = torch.zeros_like(self._before)
        self._now[:, 0] = 1
        self._known = 0
        self._repeat = False

    @property
    def state(self) -> Tensor:
        flags = torch.tensor([self._known, self._repeat], dtype=torch.float64)
        return torch.cat([self._before.cpu().ravel(), self._now.cpu().ravel(), flags])

    def load(self, state: Tensor) -> None:
        size = self._now.numel()
        self._before.copy_(state[:size].view_as(self._before))
        self._now.copy_(state[size : 2 * size].view_as(self._now))
        self._known, self._repeat = int(state[-2]), bool(state[-1])

    def lost(self) -> bool:
        """Whether the coming step must be orthogonalised against everything."""
        if self._repeat:
            return True
        if self._known == 0:
            return False
        # The coming product is one step ahead of the estimate: keep a margin of ten.
        worst = self._now[:, : self._known].abs().max()
        return bool(worst > 0.1 * math.sqrt(self._eps))

    def advance(self, step: int, *, everything: bool) -> None:
        """From q_j and q_{j-1} to q_{j+1}, j = ``step``."""
        alpha, beta = self._recurrence.alpha, self._recurrence.beta
        if everything:
            following = torch.zeros_like(self._now)
            following[:, : step + 1] = self._floor
        else:
            now, before = self._now, self._before
            right = torch.zeros_like(now)
            right[:, :step] = beta[:, :step] * now[:, 1 : step + 1]
            left = torch.zeros_like(now)
            left[:, 1:step] = beta[:, : max(0, step - 1)] * now[:, : max(0, step - 1)]
            drift = torch.zeros_like(now)
            drift[:, :step] = (alpha[:, :step] - alpha[:, step : step + 1]) * now[:, :step]
            previous = beta[:, step - 1 : step] if step else torch.zeros_like(beta[:, :1])
            total = right + left + drift - previous * before
            scale = beta[:, step : step + 1].clamp(min=torch.finfo(torch.float64).tiny)
            noise = 4 * self._eps * self._recurrence.bound[:, None]
            following = (total + torch.sign(total) * noise) / scale
            following[:, step] = self._floor
            following[:, step + 1 :] = 0
            following = torch.where(self._recurrence.active.bool()[:, None], following, 0)
        # The first of two full steps still has the second to come.
        self._repeat = everything and not self._repeat
        following[:, step + 1] = 1
        self._known = step + 1
        self._before, self._now = self._now, following


class _Symmetry:
    """Whether ``q_{j-1} . A q_j`` is beta_{j-1}, as it is for a symmetric A; no synchronisation.

    Attributes:
        asymmetry: the largest difference seen, a share of the operator's norm, float64 ``[probes]``.
        tolerated: what rounding explains: products are far from as exact as single operations.
    """

    def __init__(self, recurrence: Recurrence, *, eps: float) -> None:
        self._recurrence = recurrence
        self.tolerated = eps**0.4
        self.asymmetry = torch.zeros_like(recurrence.bound)

    def look(self, step: int, previous: Tensor, image: Tensor) -> None:
        """Compare at one step: q_{j-1} and A q_j, ``[probes, n]`` each."""
        overlap = torch.linalg.vecdot(previous, image).double()
        gap = (overlap - self._recurrence.beta[:, step - 1]).abs()
        norm = torch.linalg.vector_norm(image, dim=1).double()
        share = gap / torch.maximum(norm, self._recurrence.bound)
        share = torch.where(self._recurrence.active.bool(), share, 0)
        torch.maximum(self.asymmetry, share, out=self.asymmetry)


class _Snapshot:
    """T after a step, on the host; still on its way there where the run is on a GPU."""

    def __init__(
        self, recurrence: Recurrence, asymmetry: Tensor | None, *, step: int, full_passes: int
    ) -> None:
        self.step = step
        self.full_passes = full_passes
        self.recurrence = Recurrence(
            **{name: _to_host(getattr(recurrence, name)) for name in STATE_ARRAYS}
        )
        self.asymmetry = None if asymmetry is None else _to_host(asymmetry)
        self._arrival: Any = None
        device = recurrence.alpha.device
        if device.type == "cuda":
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # The stream of the copies, not of the current device: the model may be on another.
            self._arrival.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until everything has arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory; from a GPU it is only begun."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


class _Monitor:
    """The recurrence as the host sees it: judged step by step, a fixed lag behind a GPU.

    A run ends at the first step whose judgement says so, whatever was computed meanwhile: neither T
    nor the number of products depends on how fast anything is, and ranks that share out the samples
    leave the loop together.
    """

    def __init__(
        self,
        recurrence: Recurrence,
        symmetry: _Symmetry | None,
        *,
        tolerance: float | None,
        start: Progress,
    ) -> None:
        self._recurrence = recurrence
        self._symmetry = symmetry
        self._tolerance = tolerance
        self._lag = HOST_LAG if recurrence.alpha.device.type == "cuda" else 0
        self._waiting: deque[_Snapshot] = deque()
        self._latest = self._snapshot(start.done - 1, start.full_passes)
        self._latest.wait()
        self.ended = start.ended

    def note(self) -> str | None:
        if self._latest.step % JUDGED_EVERY:
            return None
        return f"|T| {float(self._latest.recurrence.bound.max()):.4g}"

    def record(self, step: int, full_passes: int) -> None:
        """Take T after ``step`` in, and judge what is a lag behind."""
        self._waiting.append(self._snapshot(step, full_passes))
        self._judge_until(step - self._lag)

    def leaves(self, step: int) -> bool:
        """Whether the loop ends after ``step``: a lag behind the end, also if that is known already.

        Only some of the ranks may have had to settle early, to write.
        """
        return self.ended and step >= self._latest.step + self._lag

    def settle(self) -> _Snapshot:
        """Judge every step that was recorded; T where the run ends, or is."""
        if self._waiting:
            self._judge_until(self._waiting[-1].step)
        return self._latest

    def _snapshot(self, step: int, full_passes: int) -> _Snapshot:
        asymmetry = None if self._symmetry is None else self._symmetry.asymmetry
        return _Snapshot(self._recurrence, asymmetry, step=step, full_passes=full_passes)

    def _judge_until(self, step: int) -> None:
        while self._waiting and self._waiting[0].step <= step and not self.ended:
            self._latest = self._waiting.popleft()
            self._latest.wait()
            self._refuse_nonfinite(self._latest)
            self._refuse_asymmetric(self._latest)
            self.ended = not bool(self._latest.recurrence.active.any()) or (
                self._tolerance is not None
                and self._latest.step % JUDGED_EVERY == 0
                and _converged(self._latest.recurrence, self._tolerance)
            )

    def _refuse_asymmetric(self, seen: _Snapshot) -> None:
        if self._symmetry is None or seen.asymmetry is None:
            return
        worst = float(seen.asymmetry.max())
        if worst > self._symmetry.tolerated:
            raise AsymmetryError(worst)

    @staticmethod
    def _refuse_nonfinite(seen: _Snapshot) -> None:
        if not bool(torch.isfinite(seen.recurrence.bound).all()):
            broken = ~torch.isfinite(seen.recurrence.alpha[:, : seen.step + 1])
            first = int(broken.any(dim=0).nonzero()[0]) if bool(broken.any()) else seen.step
            raise FloatingPointError(
                f"the operator's product held NaN or infinity at step {first + 1}; "
                "a larger dtype (dtype=torch.float64) may help if the model overflows"
            )


def _converged(recurrence: Recurrence, tolerance: float) -> bool:
    """Whether the best probe's residuals of both extremes are small enough."""
    ends: list[tuple[float, float]] = []
    starts: list[tuple[float, float]] = []
    for probe, order in enumerate(recurrence.steps_taken.tolist()):
        alpha = recurrence.alpha[probe, :order].numpy()
        beta = recurrence.beta[probe, :order].numpy()
        nodes, vectors = np.linalg.eigh(tridiagonal(alpha, beta))
        residuals = np.abs(beta[order - 1] * vectors[-1])
        starts.append((float(nodes[0]), float(residuals[0])))
        ends.append((float(nodes[-1]), float(residuals[-1])))
    norm = max(abs(min(starts)[0]), abs(max(ends)[0]))
    return max(min(starts)[1], max(ends)[1]) <= tolerance * norm
