"""Post-hoc logit adjustment (Menon et al. 2021): ``z - tau log(prior)``."""

from __future__ import annotations

import torch

from fastsam.longtail.calibrators.base import (
    Calibrator,
    Parameters,
    TrainedHead,
    register_calibrator,
)
from fastsam.longtail.classes import adjust_logits
from fastsam.longtail.models.heads import AffineHead

TAUS = (*(step / 20 for step in range(61)), 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Candidates of tau: 0 to 3 in steps of 0.05, then larger steps.

0 changes nothing. If the logits are log-probabilities, 1 is the consistent choice for a balanced test set.
Larger values are for LDAM, whose loss multiplies logits by 30: they are several times as large as
log-probabilities."""


def _build(parameters: Parameters, trained: TrainedHead) -> AffineHead:
    zero = torch.zeros(len(trained.counts), dtype=torch.float64)
    offset = adjust_logits(zero, trained.counts, parameters["tau"])
    return AffineHead(trained.module, trained.logit_scale, offset.float())


register_calibrator(
    Calibrator(
        name="logit-adjustment",
        build=_build,
        candidates=lambda trained, training: [{"tau": tau} for tau in TAUS],
        change=1,
        summary="z - tau log(prior)",
    )
)
