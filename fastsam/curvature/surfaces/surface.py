"""The mean loss on a line or a plane through the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsam.curvature.checks import check_count, check_number
from fastsam.curvature.data import read_batches
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.lanczos.quadrature import Floats
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss
from fastsam.curvature.mean_loss import MeanLoss
from fastsam.curvature.surfaces.directions import (
    Direction,
    Normalization,
    check_normalization,
    cosine_of,
    direction_rows,
)
from fastsam.curvature.surfaces.points import PointsFile, evaluate_points, fingerprint_of
from fastsam.kernels.backends import widened

_MARK = "fastsam_surface"


@dataclass(frozen=True, eq=False)
class Surface:
    """The mean loss at ``weights + a d_0`` or ``weights + a d_0 + b d_1``.

    Losses that are not finite are kept: they show where the network overflows.

    Attributes:
        coordinates: values of a, and of b for two directions, float64 ``[points]`` each.
        losses: mean losses, ``[points]``, or ``[points, points]`` with a as the first index.
        metrics: mean metrics of the same shape; None without a metric.
        loss: mean loss at the weights.
        norms: 2-norm of each direction; a step of 1 in a coordinate has this length.
        cosine: cosine of the angle between two directions; None for one.
        normalize: normalization of the directions.
        fingerprint: checksum of parameters, buffers, directions, coordinates and data.
        metric: mean metric at the weights; None without a metric.
    """

    coordinates: tuple[Floats, ...]
    losses: Floats
    metrics: Floats | None
    loss: float
    norms: tuple[float, ...]
    cosine: float | None
    normalize: Normalization
    fingerprint: str
    metric: float | None = None

    def plot(self, axes: Any = None, *, levels: int = 20, metric: bool = False) -> Any:
        """Draw a curve, or filled contours, with matplotlib and return the axes.

        Values that are not finite are left blank. The weights are marked.

        Args:
            axes: matplotlib axes. Default None: a new figure.
            levels: number of contours of a surface of two directions. Default 20.
            metric: whether to draw the metric instead of the loss.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no value is finite, or there is no metric.
        """
        from fastsam.curvature.surfaces.figures import plot_surface

        return plot_surface(self, axes=axes, levels=levels, metric=metric)

    def save(self, path: str | Path) -> None:
        """Write the surface to a ``.json`` file, atomically.

        Raises:
            ValueError: ``path`` has another suffix.
            OSError: the file cannot be written.
        """
        metrics = [None] * self.losses.size if self.metrics is None else self.metrics.ravel()
        content = {
            "coordinates": [axis.tolist() for axis in self.coordinates],
            "loss": self.loss,
            "metric": self.metric,
            "norms": list(self.norms),
            "cosine": self.cosine,
            "normalize": self.normalize,
            "fingerprint": self.fingerprint,
            "losses": self.losses.ravel().tolist(),
            "metrics": list(metrics),
        }
        PointsFile(Path(path), _MARK).write(content)

    @classmethod
    def load(cls, path: str | Path) -> Surface:
        """Read a file written by :meth:`save` or by a call of :func:`loss_surface` that has ended.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a surface, is damaged, or has only a part of the points.
        """
        return PointsFile(Path(path), _MARK).load(cls._of)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> Surface:
        axes = tuple(np.asarray(axis, dtype=np.float64) for axis in content["coordinates"])
        shape = tuple(len(axis) for axis in axes)
        metrics = content["metrics"]
        measured = any(value is not None for value in metrics)
        return cls(
            coordinates=axes,
            losses=np.asarray(content["losses"], dtype=np.float64).reshape(shape),
            metrics=np.asarray(metrics, dtype=np.float64).reshape(shape) if measured else None,
            loss=content["loss"],
            norms=tuple(content["norms"]),
            cosine=content["cosine"],
            normalize=content["normalize"],
            fingerprint=content["fingerprint"],
            metric=content.get("metric"),
        )


def loss_surface(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    directions: Direction | Sequence[Direction],
    *,
    span: float = 1.0,
    points: int = 21,
    normalize: Normalization = "none",
    metric: LossFunction | BatchLoss | None = None,
    params: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    freeze: int | None = None,
    path: str | Path | None = None,
    progress: bool = True,
) -> Surface:
    """Compute the mean loss on a line or a plane through the weights.

    The model runs in evaluation mode: normalization layers use the stored statistics at every point.
    Its weights, buffers, gradients and modes, and the global random state, do not change.

    Args:
        model: as in :func:`fastsam.spectral_density`.
        loss_fn: as in :func:`fastsam.spectral_density`.
        data: as in :func:`fastsam.spectral_density`.
        directions: one or two directions, each a mapping from parameter names to tensors (parameters
            without an entry do not move) or a flat vector ``[n]`` over the chosen parameters, such as
            the rows of :attr:`fastsam.curvature.Eigenpairs.vectors`. See :func:`random_directions`.
        span: coordinates run from ``-span`` to ``span``. Default 1, as in arXiv 1712.09913.
        points: number of coordinates of each direction, at least 2. An odd number includes the
            weights. Two directions cost ``points ** 2`` passes over the data. Default 21.
        normalize: ``"none"`` (default) uses the directions unchanged; ``"filter"`` and ``"layer"`` as
            in :func:`random_directions`.
        metric: a second quantity to average over the data, such as the accuracy: a function of outputs
            and targets that returns their mean, or a :class:`BatchLoss`.
        params: names of parameters or layers that flat vectors refer to. Default None: all that
            require a gradient.
        dtype: dtype of weights and data, torch.float32 or torch.float64. Default None: that of the
            parameters, at least float32.
        freeze: as in :class:`fastsam.curvature.SpectrumOptions`.
        path: a ``.json`` file for the values that have been computed, written about once a second
            and after an error or interrupt. If it exists, the call continues from it. The finished
            file can be read by :meth:`Surface.load`. Default None.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        TypeError, ValueError: an argument is invalid, a direction does not match the model, is zero
            or parallel to the other, the loss is random, or ``path`` is of another surface.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> from fastsam.curvature import random_directions
        >>> found = loss_surface(
        ...     model, nn.CrossEntropyLoss(), batch, random_directions(model), points=5
        ... )
        >>> found.losses.shape, bool(abs(found.losses[2, 2] - found.loss) < 1e-6)
        ((5, 5), True)
    """
    check_count("points", points, least=2)
    check_number("span", span, below=math.inf)
    if not span > 0:
        raise ValueError(f"span must be above 0, got {span}")
    check_normalization(normalize)
    file = None if path is None else PointsFile(Path(path), _MARK)
    with undisturbed(model):
        batches = read_batches(data, freeze=freeze)
        mean = MeanLoss(model, loss_fn, batches, params=params, dtype=dtype, metric=metric)
        rows = direction_rows(mean.loss, directions, normalize)
        axis = np.linspace(-span, span, points)
        grid = list(np.ndindex(*[points] * len(rows)))

        def evaluate(index: int) -> tuple[float, float | None]:
            point = mean.origin.clone()
            for row, coordinate in zip(rows, grid[index], strict=True):
                point.add_(row, alpha=float(axis[coordinate]))
            return mean.at(point)

        at_weights = mean.at(mean.origin)
        head = {
            "coordinates": [axis.tolist()] * len(rows),
            "loss": at_weights[0],
            "metric": at_weights[1],
            "norms": widened(rows).norm(dim=1).tolist(),
            "cosine": cosine_of(rows),
            "normalize": normalize,
            "fingerprint": fingerprint_of(
                mean, mean.loss.checksum(), rows, f"{float(span)!r} {points} {metric is not None}"
            ),
        }
        return Surface._of(
            evaluate_points(
                evaluate,
                len(grid),
                head=head,
                file=file,
                description="surface",
                progress=progress,
            )
        )
