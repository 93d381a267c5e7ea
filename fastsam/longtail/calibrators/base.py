"""Base classes of the calibrators, and their registry."""

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
"""Parameters of a calibrator by name: JSON values or float32 tensors."""


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """The trained head that a calibrator changes.

    Attributes:
        module: maps features ``[B, D]`` to logits ``[B, C]``. Calibrators must not modify it.
        logit_scale: logit scale of the loss.
        counts: training images of each class, int64 ``[C]``.
    """

    module: nn.Module
    logit_scale: float
    counts: NDArray[np.int64]

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU if there are none."""
        value = next(chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if value is None else value.device

    def scaled(self) -> AffineHead:
        """Return the trained head, multiplied by the logit scale of the loss."""
        zero = torch.zeros(len(self.counts), device=self.device)
        return AffineHead(self.module, self.logit_scale, zero)


@dataclass(frozen=True, kw_only=True)
class Calibrator(RunPart):
    """A change of the classifier after training. Once registered, ``calibrate --method NAME`` applies it.

    Attributes:
        build: ``build(parameters, trained)`` creates the new head from one of the candidates and a
            :class:`TrainedHead`: a module that maps features ``[B, D]`` to logits ``[B, C]``. Its softmax
            should give class probabilities; a temperature is fitted afterwards. The head is moved to the
            device of the trained head.
        candidates: ``candidates(trained, training)`` yields the candidate parameters, of which validation
            chooses. The first wins ties, so it should change the least. ``training()`` returns the
            :class:`~fastsam.longtail.features.Features` of the clean training images.
        refuses: ``refuses(trained)`` returns the reason why the calibrator cannot be applied to this head,
            or None if it can.
        change: how much of the trained classifier changes: 0 nothing, 1 the offsets of its logits, 2 its
            class vectors, 3 everything. Of calibrators with equal scores the smallest change wins.
    """

    build: Callable[[Parameters, TrainedHead], nn.Module]
    candidates: Callable[[TrainedHead, Callable[[], Features]], Iterable[Parameters]]
    refuses: Callable[[TrainedHead], str | None] = field(default=lambda trained: None)
    change: int = 3


CALIBRATORS: Registry[Calibrator] = Registry("calibrator", "fastsam.longtail.calibrators")
register_calibrator = CALIBRATORS.add
