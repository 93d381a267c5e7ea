"""The largest and the smallest curvature during training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.curvature.checks import check_count, check_number
from fastsam.curvature.data import Batches, read_batches
from fastsam.curvature.ends import Ends, find_ends
from fastsam.curvature.groups import group_loaders
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss, unwrapped
from fastsam.curvature.operators.base import ResolutionError
from fastsam.curvature.options import SpectrumOptions
from fastsam.curvature.pace import Pace
from fastsam.curvature.plots import plot_tracking
from fastsam.curvature.points import CurvaturePoint, write_points
from fastsam.curvature.prepared import prepared_run
from fastsam.curvature.products.kinds import kind_named
from fastsam.curvature.products.planning import Measurements
from fastsam.curvature.products.selection import parameter_names
from fastsam.kernels.backends import widened
from fastsam.records import build

BUDGET = 0.05
"""Default share of the training time that measurements may take."""

SAMPLES = 256
"""Default number of samples of a group of classes."""

TOLERANCE = 0.02
"""Default residual of an eigenvalue as a fraction of it."""

MOST_PRODUCTS = 200
"""Default limit on the products of one measurement."""


@dataclass
class _Subject:
    """What is measured: some samples and some parameters, and where the next measurement starts."""

    batches: Batches
    params: list[str]
    measurements: Measurements = field(default_factory=Measurements)
    vectors: Tensor | None = None


class CurvatureTracker:
    """Measures lambda_max and lambda_min of the Hessian while a model trains.

    Call :meth:`step` once in every training step, when the weights are not perturbed: before the first
    pass, or after the update. The samples are read once and held, so that all measurements belong to
    the same function of the weights. A measurement starts from the eigenvectors of the last one. It
    changes nothing: a run has the same bits with and without a tracker.

    Args:
        model: as in :func:`fastsam.spectral_density`.
        loss_fn: as in :func:`fastsam.spectral_density`.
        data: as in :func:`fastsam.spectral_density`, without random augmentation; with ``classes`` as
            in :func:`fastsam.class_spectra`. A loader is read once. One product costs as much as two
            or three gradients on these samples, and a measurement has 10 to 30.
        every: number of steps from one measurement to the next. The first call is measured, and then
            each step that reaches or passes another multiple of ``every``.
        budget: largest share of the training time that measurements may take; they wait until they
            fit. The first one does not wait. None measures at every due step, so that equal runs
            measure equal steps. Default 0.05.
        classes: classes to measure separately, or the classes of each group by its name. Default
            None: all samples together.
        params: names of parameters or layers, or several such lists by name to measure separately.
            Default None: all parameters that require a gradient.
        samples: number of samples to which a class or group is reduced, drawn once. Default 256.
        targets: as in :func:`fastsam.class_spectra`.
        kind: curvature matrix, as in :class:`fastsam.curvature.SpectrumOptions`.
        tol: largest residual of an end of the spectrum, as a fraction of its own absolute value. A
            residual below ``tol**2`` times the larger of both absolute values is small enough, too.
            Default 0.02. The error of an eigenvalue that is separated from others is of the order of
            the square of its residual.
        max_products: number of products after which a measurement ends unconverged. Default 200.
        dtype: as in :class:`fastsam.curvature.SpectrumOptions`. Where the curvature is below the
            resolution of float32, float64 is used.
        seed: seed of the choice of samples and of random vectors.
        path: file to which every point is written, one JSON object a line. Default None: no file.
        clock: returns the time in seconds.

    Attributes:
        points: all measurements so far.

    Raises:
        TypeError, ValueError: an argument is invalid, a class has no sample, or a name selects no
            parameter.

    Example:
        >>> model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> inputs, targets = torch.randn(8, 3), torch.arange(8) % 2
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> tracker = CurvatureTracker(model, criterion, (inputs, targets), every=10, budget=None)
        >>> for _ in range(30):
        ...     points = tracker.step(lr=0.1)
        ...     criterion(model(inputs), targets).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> [point.step for point in tracker.points]
        [0, 10, 20]
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | OutputLoss | BatchLoss,
        data: Any,
        *,
        every: int,
        budget: float | None = BUDGET,
        classes: Iterable[int] | Mapping[str, Iterable[int]] | None = None,
        params: Iterable[str] | Mapping[str, Iterable[str]] | None = None,
        samples: int | None = SAMPLES,
        targets: Sequence[int] | Tensor | None = None,
        kind: str = "hessian",
        tol: float = TOLERANCE,
        max_products: int = MOST_PRODUCTS,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        path: str | Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pace = Pace(every=every, budget=budget, clock=clock)
        check_number("tol", tol, below=1)
        check_count("max_products", max_products)
        if samples is not None:
            check_count("samples", samples)
        kind_named(kind)
        self._model, self._loss_fn = model, loss_fn
        self._tol, self._clock = tol, clock
        self._options = SpectrumOptions(
            kind=kind, dtype=dtype, seed=seed, steps=max_products, progress=False
        )
        self._path = None if path is None else Path(path)
        self._next_step = 0
        self.points: list[CurvaturePoint] = []
        names = {
            name: parameter_names(unwrapped(model), some) for name, some in _parts(params).items()
        }
        sources = {"": data}
        if classes is not None:
            groups = _groups(classes)
            sources = group_loaders(data, groups, targets=targets, most_samples=samples, seed=seed)
        with undisturbed(model):
            held = {name: read_batches(source, freeze=1) for name, source in sources.items()}
        self._subjects = {
            ", ".join(filter(None, (group, part))) or "all": _Subject(batches, params)
            for group, batches in held.items()
            for part, params in names.items()
        }

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of what is measured, as in :attr:`CurvaturePoint.group`."""
        return tuple(self._subjects)

    @property
    def overhead(self) -> float:
        """Time of the measurements divided by the training time, both since the first step.

        Training time is all time that is not spent in a measurement. The constructor, which reads the
        samples once, counts as neither.
        """
        return self._pace.overhead

    def step(
        self, step: int | None = None, *, lr: float | None = None
    ) -> tuple[CurvaturePoint, ...]:
        """Measure if a measurement is due and fits the budget.

        Args:
            step: number of this step, larger than in the last call. Default None: that of the last
                call plus one; the first is 0.
            lr: learning rate of the step, for the line 2/lr in plots.

        Returns:
            One point per group if the step was measured, else an empty tuple.

        Raises:
            ValueError: the step is not larger than the last one, or the loss is not finite.
            FloatingPointError: a product contains NaN or infinity.
            FileExistsError: the file of an earlier run is at ``path``.
        """
        step = self._next_step if step is None else step
        if step < self._next_step:
            raise ValueError(
                f"step must be at least {self._next_step}, the one after the last call, got {step}; call "
                "step() once in every training step"
            )
        if not self.points and self._path is not None and self._path.exists():
            raise FileExistsError(
                f"{self._path} exists; choose another path or delete it. To resume its run, call "
                "load_state_dict before the first step"
            )
        self._next_step = step + 1
        self._pace.train()
        if not self._pace.is_due(step):
            return ()
        if self._device.type == "cuda":  # steps that the device has not finished are training, too
            torch.cuda.synchronize(self._device)
            self._pace.train()
        with self._pace.measurement(step):
            found = tuple(
                self._measure(name, subject, step, lr) for name, subject in self._subjects.items()
            )
        self.points += found
        if self._path is not None:
            write_points(self.points, self._path)
        return found

    def plot(self, *, marks: Mapping[str, float] | None = None) -> Any:
        """Draw the points; see :func:`fastsam.curvature.plots.plot_tracking`."""
        return plot_tracking(self.points, marks=marks)

    def state_dict(self) -> dict[str, Any]:
        """Return points, eigenvectors and times, in a form that ``torch.load(weights_only=True)`` reads."""
        return {
            "points": [asdict(point) for point in self.points],
            "vectors": {
                name: subject.vectors.cpu()
                for name, subject in self._subjects.items()
                if subject.vectors is not None
            },
            "next_step": self._next_step,
            "pace": self._pace.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state_dict`.

        The file at ``path`` is replaced at the next measurement, so points after the resumed step
        do not occur twice.

        Raises:
            ValueError: the state belongs to other groups or parameters.
        """
        vectors = state["vectors"]
        if vectors and set(vectors) != set(self._subjects):
            raise ValueError(
                f"the state has the groups {', '.join(vectors)}, but this tracker has "
                f"{', '.join(self._subjects)}; create it with the same classes and params"
            )
        for name, found in vectors.items():
            size = self._dimension(self._subjects[name])
            if found.shape[-1] != size:
                raise ValueError(
                    f"the state has vectors of {found.shape[-1]} parameters for {name}, but this tracker "
                    f"has {size}; create it with the same model and params"
                )
        for name, found in vectors.items():
            self._subjects[name].vectors = found.to(self._device)
        self.points = [build(CurvaturePoint, point) for point in state["points"]]
        self._next_step = state["next_step"]
        self._pace.load_state_dict(state["pace"])

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _dimension(self, subject: _Subject) -> int:
        parameters = dict(unwrapped(self._model).named_parameters())
        return sum(parameters[name].numel() for name in subject.params)

    def _measure(
        self, group: str, subject: _Subject, step: int, lr: float | None
    ) -> CurvaturePoint:
        began = self._clock()
        try:
            ends, loss, gradient_norm = self._run(subject, self._options)
        except ResolutionError:
            # A class that is fitted nearly perfectly is no reason to end the training.
            ends, loss, gradient_norm = self._run(
                subject, replace(self._options, dtype=torch.float64)
            )
        subject.vectors = ends.vectors
        return CurvaturePoint(
            step=step,
            group=group,
            lambda_max=ends.largest,
            lambda_min=ends.smallest,
            residuals=ends.residuals,
            converged=ends.converged,
            products=ends.products,
            seconds=self._clock() - began,
            loss=loss,
            gradient_norm=gradient_norm,
            lr=lr,
        )

    def _run(self, subject: _Subject, options: SpectrumOptions) -> tuple[Ends, float, float]:
        """Return the ends of the spectrum, the loss and the norm of its gradient."""
        own = replace(options, params=subject.params, measurements=subject.measurements)
        with prepared_run(self._model, self._loss_fn, subject.batches, own) as run:
            ends = find_ends(
                run.operator,
                start=subject.vectors,
                tol=self._tol,
                most_products=options.steps,
                seed=options.seed,
            )
            return ends, run.operator.loss, float(widened(run.operator.gradient).norm())


def _groups(classes: Iterable[int] | Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Return the classes of each group by name."""
    if isinstance(classes, Mapping):
        groups = {str(name): list(members) for name, members in classes.items()}
    else:
        groups = {f"class {label}": [label] for label in classes}
    empty = [name for name, members in groups.items() if not members]
    if empty or not groups:
        where = f" for the group {empty[0]!r}" if empty else ""
        raise ValueError(f"classes has no class{where}; pass at least one, or None for all samples")
    return groups


def _parts(
    params: Iterable[str] | Mapping[str, Iterable[str]] | None,
) -> dict[str, Iterable[str] | None]:
    """Return selections of parameters by name; a single one has no name."""
    if not isinstance(params, Mapping):
        return {"": params}
    if not params:
        raise ValueError("params has no entry; pass at least one, or None for all parameters")
    return dict(params)
