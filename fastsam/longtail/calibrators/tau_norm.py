"""Tau-normalization (Kang et al. 2020): class vectors divided by a power of their norm.

Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition" (ICLR 2020), section
4: ``w_c / ||w_c||^tau``. As in the authors' code (``tau_norm.py`` of facebookresearch/classifier-balancing),
the bias is dropped: tau = 0 gives the trained classifier without its bias.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastsam.longtail.calibrators.base import (
    Calibrator,
    Parameters,
    TrainedHead,
    register_calibrator,
)
from fastsam.longtail.models.heads import CosineHead

TAUS = tuple(step / 10 for step in range(21))
"""The grid of the authors' code: 0 to 2 in steps of 0.1."""


def _refuses(trained: TrainedHead) -> str | None:
    head = trained.module
    if isinstance(head, CosineHead):
        return "a cosine head already normalizes its class vectors"
    # isinstance() would accept subclasses, which may use the same weights differently.
    if type(head) is not nn.Linear:
        return f"it requires a linear head (nn.Linear), but this run has {type(head).__name__}"
    return None


def _build(parameters: Parameters, trained: TrainedHead) -> nn.Linear:
    before = trained.module
    if not isinstance(before, nn.Linear):
        raise AssertionError("_refuses() accepts only linear heads")
    weight = before.weight.detach().double()
    length = weight.norm(dim=1, keepdim=True)
    # A class vector of zeros is not changed.
    divisor = torch.where(length > 0, length ** parameters["tau"], 1.0)
    head = copy.deepcopy(before).requires_grad_(requires_grad=False)
    head.weight.copy_(trained.logit_scale * weight / divisor)
    if head.bias is not None:  # exported weights have the entries of the trained head
        head.bias.zero_()
    return head


register_calibrator(
    Calibrator(
        name="tau-norm",
        build=_build,
        candidates=lambda trained, training: [{"tau": tau} for tau in TAUS],
        refuses=_refuses,
        change=2,
        summary="class vectors divided by a power of their norm, no bias",
    )
)
