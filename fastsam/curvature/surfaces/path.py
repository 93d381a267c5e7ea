"""The mean loss on the straight line between two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastsam.curvature.checks import check_count
from fastsam.curvature.data import read_batches
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.lanczos.quadrature import Floats
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss, unwrapped
from fastsam.curvature.mean_loss import MeanLoss
from fastsam.curvature.randomness import USER_CODE
from fastsam.curvature.surfaces.points import PointsFile, evaluate_points, fingerprint_of
from fastsam.kernels.backends import widened

Buffers = Literal["interpolate", "first", "second", "model"]

_MARK = "fastsam_loss_path"


@dataclass(frozen=True, eq=False)
class LossPath:
    """The mean loss at ``(1 - t) first + t second``.

    Attributes:
        positions: values of t from 0 to 1, float64 ``[points]``.
        losses: mean losses, ``[points]``; those that are not finite are kept.
        metrics: mean metrics, ``[points]``; None without a metric.
        distance: 2-norm of the difference between the parameters of the ends.
        buffers: which buffers were used; see :func:`loss_path`.
        fingerprint: checksum of both ends, the positions and the data.
    """

    positions: Floats
    losses: Floats
    metrics: Floats | None
    distance: float
    buffers: Buffers
    fingerprint: str

    @property
    def excess(self) -> Floats:
        """Losses minus the linear interpolation of the losses of the two ends, ``[points]``."""
        line = (1 - self.positions) * self.losses[0] + self.positions * self.losses[-1]
        excess: Floats = self.losses - line
        return excess

    @property
    def barrier(self) -> float:
        """Height of the barrier: the largest excess, at least 0.

        The barrier of Entezari et al., "The Role of Permutation Invariance in Linear Mode
        Connectivity of Neural Networks" (ICLR 2022, arXiv 2110.06296), on the points of the path. It
        is NaN if a loss is NaN or the loss of an end is infinite.
        """
        return float(np.max(self.excess))

    @property
    def barrier_position(self) -> float:
        """Position t of the largest excess."""
        return float(self.positions[np.argmax(self.excess)])

    def plot(self, axes: Any = None, *, label: str | None = None) -> Any:
        """Draw the loss with matplotlib and return the axes.

        Args:
            axes: matplotlib axes. Default None: a new figure.
            label: label of the curve in a legend.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from fastsam.curvature.surfaces.figures import plot_path

        return plot_path(self, axes=axes, label=label)

    def save(self, path: str | Path) -> None:
        """Write the path to a ``.json`` file, atomically.

        Raises:
            ValueError: ``path`` has another suffix.
            OSError: the file cannot be written.
        """
        metrics = [None] * len(self.losses) if self.metrics is None else self.metrics.tolist()
        content = {
            "positions": self.positions.tolist(),
            "loss": float(self.losses[0]),
            "metric": metrics[0],
            "distance": self.distance,
            "buffers": self.buffers,
            "fingerprint": self.fingerprint,
            "losses": self.losses.tolist(),
            "metrics": metrics,
        }
        PointsFile(Path(path), _MARK).write(content)

    @classmethod
    def load(cls, path: str | Path) -> LossPath:
        """Read a file written by :meth:`save` or by a call of :func:`loss_path` that has ended.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a path, is damaged, or has only a part of the points.
        """
        return PointsFile(Path(path), _MARK).load(cls._of)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> LossPath:
        metrics = content["metrics"]
        measured = any(value is not None for value in metrics)
        return cls(
            positions=np.asarray(content["positions"], dtype=np.float64),
            losses=np.asarray(content["losses"], dtype=np.float64),
            metrics=np.asarray(metrics, dtype=np.float64) if measured else None,
            distance=content["distance"],
            buffers=content["buffers"],
            fingerprint=content["fingerprint"],
        )


def loss_path(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    *,
    points: int = 21,
    buffers: Buffers = "interpolate",
    metric: LossFunction | BatchLoss | None = None,
    dtype: torch.dtype | None = None,
    freeze: int | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> LossPath:
    """Compute the mean loss on the straight line between two checkpoints of a model.

    All floating-point parameters are interpolated. The model only provides the architecture: its
    weights, buffers, gradients and modes, and the global random state, do not change. It runs in
    evaluation mode, so BatchNorm uses the buffers below. Interpolated statistics are not those of the
    interpolated network; a barrier of a network with BatchNorm may come from the statistics alone
    (Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", arXiv
    2211.08403).

    Args:
        model: as in :func:`fastsam.spectral_density`.
        loss_fn: as in :func:`fastsam.spectral_density`.
        data: as in :func:`fastsam.spectral_density`.
        first: state of the first end, as returned by ``model.state_dict()``.
        second: state of the second end.
        points: number of equidistant points, at least 2, both ends included. Default 21.
        buffers: buffers, such as the running statistics of BatchNorm. ``"interpolate"`` (default)
            interpolates floating-point buffers like the parameters, so that the losses of both ends
            are those of the checkpoints; buffers of other dtypes are those of the first end.
            ``"first"`` and ``"second"`` use the buffers of one end, and ``"model"`` those of the
            model, at all points; the losses of ends with other buffers are then not those of their
            checkpoints.
        metric: as in :func:`loss_surface`.
        dtype: as in :func:`loss_surface`.
        freeze: as in :func:`loss_surface`.
        path: as in :func:`loss_surface`.
        progress: as in :func:`loss_surface`.

    Raises:
        TypeError, ValueError: an argument is invalid, a state does not fit the model, the loss is
            random, or ``path`` is of another path.

    Example:
        >>> first, second = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> line = loss_path(
        ...     first, nn.CrossEntropyLoss(), batch, first.state_dict(), second.state_dict()
        ... )
        >>> line.barrier == 0.0  # the loss of a linear model is convex
        True
    """
    check_count("points", points, least=2)
    if buffers not in get_args(Buffers):
        raise ValueError(f"buffers must be one of {', '.join(get_args(Buffers))}, got {buffers!r}")
    file = None if path is None else PointsFile(Path(path), _MARK)
    with undisturbed(model):
        bare = unwrapped(model)
        ends = [
            _checked(bare, state, name) for state, name in ((first, "first"), (second, "second"))
        ]
        with USER_CODE:  # another run may have swapped its parameters into the model
            names = [name for name, p in bare.named_parameters() if p.is_floating_point()]
        batches = read_batches(data, freeze=freeze)
        mean = MeanLoss(model, loss_fn, batches, params=names, dtype=dtype, metric=metric)
        line = _Line(mean, *ends, buffers=buffers)
        positions = np.linspace(0, 1, points)
        at_first = line.at(0.0)
        head = {
            "positions": positions.tolist(),
            "loss": at_first[0],
            "metric": at_first[1],
            "distance": line.distance,
            "buffers": buffers,
            "fingerprint": line.fingerprint(f"{points} {buffers} {metric is not None}"),
        }
        return LossPath._of(
            evaluate_points(
                lambda index: line.at(float(positions[index])),
                points,
                head=head,
                file=file,
                description="path",
                progress=progress,
            )
        )


class _Line:
    """The line between two states of a model."""

    def __init__(
        self,
        mean: MeanLoss,
        first: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        *,
        buffers: Buffers,
    ) -> None:
        loss = mean.loss

        def placed(tensor: Tensor) -> Tensor:
            dtype = loss.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(loss.device, dtype)

        self._mean = mean
        self._points = [
            loss.join(placed(state[name]) for name in loss.names) for state in (first, second)
        ]
        start = second if buffers == "second" else first
        end = first if buffers == "first" else second
        # Buffers that a state does not hold (persistent=False) are those of the model.
        self._buffers = {
            name: (placed(start[name]), placed(end[name]))
            for name in loss.constants
            if name in first and buffers != "model"
        }

    @property
    def distance(self) -> float:
        return float(widened(self._points[1] - self._points[0]).norm())

    def at(self, position: float) -> tuple[float, float | None]:
        """Return the loss and the metric at a position in [0, 1]."""
        constants = {
            name: _between(start, end, position) for name, (start, end) in self._buffers.items()
        }
        mean = self._mean.with_constants(constants)
        return mean.at(_between(self._points[0], self._points[1], position))

    def fingerprint(self, text: str) -> str:
        # Not the weights of the model, which do not matter.
        constants = self._mean.loss.constants.items()
        own = [value for name, value in constants if name not in self._buffers]
        ends = [tensor for pair in self._buffers.values() for tensor in pair]
        return fingerprint_of(self._mean, *self._points, *own, *ends, text)


def _between(start: Tensor, end: Tensor, position: float) -> Tensor:
    """Interpolate two tensors, exactly at both ends; tensors that are not real numbers do not change."""
    if position == 0 or not start.is_floating_point():
        return start
    return end if position == 1 else torch.lerp(start, end, position)


def _checked(model: nn.Module, state: Mapping[str, Tensor], which: str) -> dict[str, Tensor]:
    """Return the tensors of a state, after a comparison with those of the model.

    Raises:
        TypeError: the state is not a mapping.
        ValueError: a name is missing or unknown, or a shape is wrong.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{which} must be a state as returned by model.state_dict(), got {type(state).__name__}"
        )
    with USER_CODE:  # another run may have swapped its parameters into the model
        own = {name: value for name, value in model.state_dict().items() if _is_tensor(value)}
    given = {name: value.detach() for name, value in state.items() if _is_tensor(value)}
    for name in sorted(set(own) ^ set(given)):
        what = "no tensor" if name in own else "an unknown tensor"
        raise ValueError(
            f"the {which} state has {what} {name!r}; expected the names of model.state_dict()"
        )
    for name, value in own.items():
        if given[name].shape != value.shape:
            raise ValueError(
                f"{name!r} of the {which} state has shape {tuple(given[name].shape)}, expected "
                f"{tuple(value.shape)}"
            )
    return given


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
