"""What calibrators have in common, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastsam.longtail.features import Features
from fastsam.longtail.models.heads import AffineHead
from fastsam.longtail.registry import Registry, RunPart

Parameters = Mapping[str, Any]
"""Parameters of a calibrator by name: plain JSON values, and float32 tensors."""


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """The classifier that a calibrator starts from.

    Attributes:
        module: maps features ``[B, D]`` to the logits of the training, ``[B, C]``. Calibrators leave it
            unchanged.
        logit_scale: factor of the loss on logits.
        counts: training images of each class, int64 ``[C]``.
    """

    module: nn.Module
    logit_scale: float
    counts: NDArray[np.int64]

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU if it has none."""
        value = next(chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if value is None else value.device

    def scaled(self) -> AffineHead:
        """The trained head with the logit scale of the loss."""
        zero = torch.zeros(len(self.counts), device=self.device)
        return AffineHead(self.module, self.logit_scale, zero)


@dataclass(frozen=True, kw_only=True)
class Calibrator(RunPart):
    """A change of the classifier after training; once registered, ``--method NAME`` applies it.

    Attributes:
        build: ``build(parameters, trained)`` makes the new head, a module that maps features ``[B, D]``
            to logits ``[B, C]``, of one of the candidates and a :class:`TrainedHead`. Its softmax should
            be the probability of each class; a temperature is fitted afterwards. It is moved to the
            device of the trained head.
        candidates: ``candidates(trained, training)`` gives the parameters among which validation chooses,
            the one nearest to no change first: it wins ties. ``training()`` returns the
            :class:`~fastsam.longtail.features.Features` of the clean training images.
        refuses: ``refuses(trained)`` says why the calibrator has no meaning for this head; None where it
            has.
        change: how much of the trained classifier changes, for ties between calibrators: 0 nothing, 1 the
            offsets of its logits, 2 its class vectors, 3 everything.
    """

    build: Callable[[Parameters, TrainedHead], nn.Module]
    candidates: Callable[[TrainedHead, Callable[[], Features]], Iterable[Parameters]]
    refuses: Callable[[TrainedHead], str | None] = field(default=lambda trained: None)
    change: int = 3


CALIBRATORS: Registry[Calibrator] = Registry("calibrator", "fastsam.longtail.calibrators")
register_calibrator = CALIBRATORS.add
