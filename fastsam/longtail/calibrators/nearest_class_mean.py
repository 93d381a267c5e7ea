"""Nearest-class-mean classifier (Kang et al. 2020), which replaces the trained head.

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition" (ICLR 2020), section
4. The three feature transforms are those of the authors' code (``run_networks.py`` and
``models/KNNClassifier.py`` of facebookresearch/classifier-balancing): ``un`` (no change), ``l2n`` (divide by
the norm) and ``cl2n`` (subtract the mean training feature, then divide by the norm). The class means are
means of transformed training features and are not normalized. Logits are negative squared Euclidean
distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.calibrators.base import (
    Calibrator,
    Parameters,
    TrainedHead,
    register_calibrator,
)
from fastsam.longtail.features import ROWS, Features


class NearestMeanHead(nn.Module):
    """A head whose logits are negative squared distances to the class means.

    Args:
        means: mean of the transformed features of each class, ``[C, D]``.
        center: vector that is subtracted from the features first, ``[D]``; None for no centering.
        unit: divide the features by their norm.

    Example:
        >>> NearestMeanHead(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))(torch.tensor([[1.0, 1.0]]))
        tensor([[-1., -5.]])
    """

    means: Tensor
    center: Tensor | None

    def __init__(self, means: Tensor, *, center: Tensor | None = None, unit: bool = False) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("center", center)
        self.unit = unit

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[B, D]`` to logits ``[B, C]``."""
        # Centering on the mean of the class means keeps the squares, and their rounding errors, small.
        middle = self.means.mean(dim=0)
        features = _transformed(features, self.center, unit=self.unit) - middle
        means = self.means - middle
        squares = features.square().sum(dim=1, keepdim=True) + means.square().sum(dim=1)
        return 2 * features @ means.T - squares


def _transformed(features: Tensor, center: Tensor | None, *, unit: bool) -> Tensor:
    """Transform features ``[B, D]``: subtract ``center`` if it is set, then normalize if ``unit`` is set."""
    if center is not None:
        features = features - center
    return functional.normalize(features, dim=1) if unit else features


def _candidates(trained: TrainedHead, training: Callable[[], Features]) -> Iterator[dict[str, Any]]:
    features = training()
    total = torch.zeros(features.values.shape[1], dtype=torch.float64)
    for chunk in features.chunks(ROWS):
        total += chunk.values.double().sum(dim=0)
    center = total / len(features)
    for transform in ("un", "l2n", "cl2n"):
        origin = center if transform == "cl2n" else None
        change = partial(_transformed, center=origin, unit=transform != "un")
        means = features.class_means(len(trained.counts), change)
        found: dict[str, Any] = {"transform": transform, "means": means.float()}
        yield found if origin is None else {**found, "center": origin.float()}


def _build(parameters: Parameters, trained: TrainedHead) -> NearestMeanHead:
    return NearestMeanHead(
        parameters["means"],
        center=parameters.get("center"),
        unit=parameters["transform"] != "un",
    )


register_calibrator(
    Calibrator(
        name="nearest-class-mean",
        build=_build,
        candidates=_candidates,
        change=3,
        summary="negative squared distances to the class means of training features",
    )
)
