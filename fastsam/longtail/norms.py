"""Limits on the norms of weight vectors (MaxNorm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses.base import at_least_float32
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.trainable import matching_names

_RECORD = "max_norm"
"""Entry of the record of a run's start with the limits."""


class NormLimits:
    """Limits on the Euclidean norms of the vectors of parameters: their slices along the first dimension.

    Alshammari et al., "Long-Tailed Recognition via Weight Balancing" (CVPR 2022), section 4: a vector that is
    too long is scaled back to the limit.

    Attributes:
        limits: limit of each limited parameter, by name.
    """

    def __init__(self, network: Classifier, limits: Mapping[str, float]) -> None:
        parameters = dict(network.named_parameters())
        self.limits = dict(limits)
        self._limited = [(parameters[name], limit) for name, limit in limits.items()]

    @classmethod
    def of_run(
        cls, config: TrainConfig, network: Classifier, record: Mapping[str, Any] | None
    ) -> NormLimits:
        """Return the limits of a run.

        Args:
            config: settings of the run.
            network: its network: before the first step, unless the limits are in ``record``.
            record: record of the run's start; None if the limits are those of the present weights.

        Raises:
            UsageError: if a setting has another form, its pattern matches no trained parameter, or the
                weights are sharded.
        """
        if config.max_norm and config.parallel == "fsdp2":
            raise UsageError(
                "max_norm requires whole weights, but parallel is fsdp2; pass parallel=ddp"
            )
        if config.max_norm and record is not None and _RECORD in record:
            return cls(network, record[_RECORD])
        trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
        limits: dict[str, float] = {}
        for text in config.max_norm:
            pattern, share, number = _parsed(text)
            for name in matching_names("max_norm", pattern, trained):
                norms = _norms(trained[name])
                low, high = float(norms.min()), float(norms.max())
                limits[name] = low + number * (high - low) if share else number
        return cls(network, limits)

    def recorded(self, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Return the record of a run's start with these limits, instead of those of another run."""
        own = {_RECORD: self.limits} if self.limits else {}
        return {**{k: v for k, v in (record or {}).items() if k != _RECORD}, **own} or None

    @torch.no_grad()
    def project(self) -> None:
        """Scale vectors back to their limits. Call it after each step."""
        for value, limit in self._limited:
            factors = (limit / _norms(value).clamp_min(torch.finfo(value.dtype).tiny)).clamp_max(1)
            value.mul_(factors.to(value).reshape(-1, *[1] * (value.ndim - 1)))


def _norms(value: Tensor) -> Tensor:
    vectors = at_least_float32(value.detach()).reshape(len(value), -1)
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms


def _parsed(text: str) -> tuple[str, bool, float]:
    """Parse ``PATTERN=NORM`` or ``PATTERN=range:SHARE``."""
    pattern, equals, value = text.rpartition("=")
    share = value.startswith("range:")
    try:
        number = float(value.removeprefix("range:"))
    except ValueError:
        equals = ""
    if not equals or not pattern or not 0 <= number < float("inf") or (not share and number == 0):
        raise UsageError(
            "max_norm must be PATTERN=NORM with a norm above 0, such as 'head.weight=1', or "
            f"PATTERN=range:SHARE with a share of at least 0, got {text!r}"
        )
    return pattern, share, number
