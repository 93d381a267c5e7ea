"""Figures of loss surfaces and paths, with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastsam.curvature.lanczos.quadrature import Floats
from fastsam.curvature.plots import import_pyplot, plain

if TYPE_CHECKING:
    from fastsam.curvature.surfaces.path import LossPath
    from fastsam.curvature.surfaces.surface import Surface


def plot_surface(surface: Surface, *, axes: Any, levels: int, metric: bool) -> Any:
    """Draw a curve or filled contours; see :meth:`fastsam.curvature.Surface.plot`."""
    values = surface.metrics if metric else surface.losses
    if values is None:
        raise ValueError("the surface has no metric; pass metric= to loss_surface")
    shown = _finite(values)
    if axes is None:
        axes = import_pyplot("a plot of a loss surface").subplots()[1]
    name = "mean metric" if metric else "mean loss"
    axes.set_xlabel("direction 0")
    if len(surface.coordinates) == 1:
        axes.plot(surface.coordinates[0], shown, linewidth=1)
        axes.axvline(0, color="gray", linewidth=0.5)
        axes.set_ylabel(name)
        return axes
    # Contours have the first index on the vertical axis.
    filled = axes.contourf(*surface.coordinates, shown.T, levels=levels)
    axes.plot(0, 0, marker="+", color="white")
    axes.set_ylabel("direction 1")
    axes.figure.colorbar(filled, ax=axes, label=name)
    return axes


def plot_path(path: LossPath, *, axes: Any, label: str | None) -> Any:
    """Draw the loss between two checkpoints; see :meth:`fastsam.curvature.LossPath.plot`."""
    shown = _finite(path.losses)
    if axes is None:
        axes = import_pyplot("a plot of a loss path").subplots()[1]
    axes.plot(path.positions, shown, label=None if label is None else plain(label), linewidth=1)
    axes.set_xlabel("position between the checkpoints")
    axes.set_ylabel("mean loss")
    if label is not None:
        axes.legend()
    return axes


def _finite(values: Floats) -> Any:
    """Mask values that are not finite.

    Raises:
        ValueError: no value is finite.
    """
    masked = np.ma.masked_invalid(values)
    if masked.count() == 0:
        raise ValueError("no value is finite, so there is nothing to draw; pass a smaller span")
    return masked
