"""A calibrator as a plug-in: subtracts a fraction of the mean logit of each class over training images."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsam.longtail.calibrators import (
    Calibrator,
    Parameters,
    TrainedHead,
    register_calibrator,
)
from fastsam.longtail.features import Features
from fastsam.longtail.models.heads import AffineHead

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def candidates(trained: TrainedHead, training: Callable[[], Features]) -> Iterator[dict[str, Any]]:
    """Yield the candidates among which validation chooses. The first one changes nothing and wins ties."""
    total = torch.zeros(len(trained.counts), device=trained.device)
    head = trained.scaled()
    with torch.no_grad():
        for chunk in training().chunks(1024, trained.device):
            total += head(chunk.values).sum(dim=0)
    means = total / int(trained.counts.sum())
    for share in SHARES:
        yield {"share": share, "offset": -share * means}


def build(parameters: Parameters, trained: TrainedHead) -> nn.Module:
    """Create the head of a candidate. A temperature for its logits is fitted afterwards."""
    return AffineHead(trained.module, trained.logit_scale, parameters["offset"])


register_calibrator(
    Calibrator(
        name="mean-shift",
        build=build,
        candidates=candidates,
        change=1,
        summary="logits minus a fraction of their mean over training images",
    )
)

if __name__ == "__main__":
    start = TrainedHead(nn.Identity(), 1.0, np.array([3, 1]))
    images = Features(torch.tensor([[2.0, 0.0]] * 3 + [[1.0, 0.8]]), torch.tensor([0, 0, 0, 1]))
    for found in candidates(start, lambda: images):
        print(found["share"], build(found, start)(images.values).argmax(dim=1).tolist())
