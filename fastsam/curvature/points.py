"""Measurements of the extreme curvature during training, and their file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastsam.files import write_text
from fastsam.records import build


@dataclass(frozen=True)
class CurvaturePoint:
    """The extreme curvature at one training step.

    Attributes:
        step: number of the step.
        group: what was measured: classes, layers, or ``all``.
        lambda_max: largest eigenvalue.
        lambda_min: smallest eigenvalue.
        residuals: ``||H v - lambda v||`` of both, in this order, and the largest error by rounding.
            There is an eigenvalue within this distance of each.
        converged: whether both residuals are within the tolerance.
        products: number of Hessian-vector products.
        seconds: time of the measurement.
        loss: mean loss of the samples.
        gradient_norm: 2-norm of the gradient of that loss. Negative curvature is a saddle only where
            it is small.
        lr: learning rate; None if the caller did not pass it.
    """

    step: int
    group: str
    lambda_max: float
    lambda_min: float
    residuals: tuple[float, float]
    converged: bool
    products: int
    seconds: float
    loss: float
    gradient_norm: float
    lr: float | None = None


def write_points(points: Iterable[CurvaturePoint], path: str | Path) -> None:
    """Write points to a file, one JSON object a line, atomically.

    Raises:
        OSError: the file cannot be written. The previous version of the file is kept.
    """
    write_text(Path(path), "".join(f"{json.dumps(asdict(point))}\n" for point in points))


def read_points(path: str | Path) -> list[CurvaturePoint]:
    """Read the points that :func:`write_points` or a :class:`CurvatureTracker` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not a point; the message names it.
    """
    points = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        try:
            points.append(build(CurvaturePoint, json.loads(line)))
        except ValueError as error:
            raise ValueError(
                f"line {number} of {path} is not a measured point: {error}; pass a file that a "
                "CurvatureTracker wrote"
            ) from error
    return points
