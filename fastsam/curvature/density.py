"""Smoothed densities of eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from fastsam.curvature.lanczos.quadrature import Floats

WidthRule = Literal["scale-free", "pyhessian", "papyan"]


def smoothing_width(rule: str, lowest: float, highest: float, *, steps: int) -> float:
    """Return the standard deviation of the smoothing Gaussian by a :data:`WidthRule`.

    Args:
        rule: name of the rule; see :meth:`fastsam.curvature.Spectrum.width`.
        lowest: smallest node.
        highest: largest node.
        steps: Lanczos steps, at least 2.

    Raises:
        ValueError: ``rule`` is unknown.
    """
    extent = highest - lowest
    scale_free = extent / 200 or max(abs(highest) / 200, float(np.finfo(float).tiny))
    if rule == "scale-free":
        return scale_free
    if rule == "pyhessian":
        return math.sqrt(1e-5 * max(1.0, extent))
    if rule == "papyan":
        return extent / (steps - 1) / math.sqrt(8 * math.log(1.25)) or scale_free
    raise ValueError(f"width rule must be one of {get_args(WidthRule)}, got {rule!r}")


def smoothed_density(
    points: Floats, nodes: Sequence[Floats], weights: Sequence[Floats], width: float
) -> Floats:
    """Return the mean over the probes of the nodes smoothed by a Gaussian, at ``points``.

    Args:
        points: eigenvalues of any shape.
        nodes: Ritz values of each probe.
        weights: their weights.
        width: standard deviation of the Gaussian.
    """
    total = np.zeros(points.shape)
    for positions, masses in zip(nodes, weights, strict=True):
        scaled = (points[..., None] - positions) / width
        total += np.exp(-0.5 * scaled**2) @ masses
    return total / (len(nodes) * width * math.sqrt(2 * math.pi))
