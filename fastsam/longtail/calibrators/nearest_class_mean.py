"""The nearest class mean (Kang et al. 2020) in place of the trained classifier.

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition" (ICLR 2020), section
4. The three feature transforms are those of the authors' code (``run_networks.py`` and
``models/KNNClassifier.py`` of facebookresearch/classifier-balancing): ``un``, the features; ``l2n``, divided
by their length; ``cl2n``, first centered on the mean training feature. Each mean is one of transformed
training features, and is not normalized again. Logits are negative squared Euclidean distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from fastsam.longtail.errors import DataError
from fastsam.longtail.features import Features

_ROWS = 4096
"""Images whose features are in float64 at the same time."""


class NearestMeanHead(nn.Module):
    """Logits that are negative squared distances to one mean of each class.

    Args:
        means: mean of the transformed features of each class, ``[C, D]``.
        center: subtracted from the features first, ``[D]``; None for nothing.
        unit: divide the features by their length.

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
        """Features ``[B, D]`` to logits ``[B, C]``."""
        # Relative to the middle of the means the squares are small, and so is their rounding.
        middle = self.means.mean(dim=0)
        features = _transformed(features, self.center, unit=self.unit) - middle
        means = self.means - middle
        squares = features.square().sum(dim=1, keepdim=True) + means.square().sum(dim=1)
        return 2 * features @ means.T - squares


def _transformed(features: Tensor, center: Tensor | None, *, unit: bool) -> Tensor:
    """Features ``[B, D]``, centered and of unit length where that is asked for."""
    if center is not None:
        features = features - center
    return functional.normalize(features, dim=1) if unit else features


def _candidates(trained: TrainedHead, training: Callable[[], Features]) -> Iterator[dict[str, Any]]:
    features = training()
    seen = torch.bincount(features.targets, minlength=len(trained.counts))
    if not seen.all():
        raise DataError(
            f"class {int(seen.argmin())} has no training image that can be read, so it has no mean; restore "
            "the files, or choose another calibrator"
        )
    total = torch.zeros(features.values.shape[1], dtype=torch.float64)
    for chunk in features.chunks(_ROWS):
        total += chunk.values.double().sum(dim=0)
    center = total / len(features)
    for transform in ("un", "l2n", "cl2n"):
        origin = center if transform == "cl2n" else None
        sums = torch.zeros(len(seen), len(center), dtype=torch.float64)
        for chunk in features.chunks(_ROWS):
            values = _transformed(chunk.values.double(), origin, unit=transform != "un")
            sums.index_add_(0, chunk.targets, values)
        found: dict[str, Any] = {"transform": transform, "means": (sums / seen[:, None]).float()}
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
