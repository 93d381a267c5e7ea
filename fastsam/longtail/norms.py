"""Limits on the norms of weight vectors (MaxNorm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsam.longtail.config import TrainConfig
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.models.heads import CosineHead
from fastsam.longtail.precision import at_least_float32
from fastsam.longtail.trainable import matching_names

_RECORD = "max_norm"
"""Entry of the record of a run's start with the limits."""


class NormLimits:
    """Limits on the Euclidean norms of class vectors and filters.

    Alshammari et al., "Long-Tailed Recognition via Weight Balancing" (CVPR 2022), section 4: a vector that is
    too long is scaled back to the limit. Their code leaves parameters with one dimension alone: biases, and
    the scales and shifts of normalization layers.

    Attributes:
        limits: limit of each limited parameter, by name.
    """

    def __init__(self, network: Classifier, limits: Mapping[str, float]) -> None:
        parameters = dict(network.named_parameters())
        self.limits = dict(limits)
        self._limited = [
            (parameters[name], _dimension(network, name), limit) for name, limit in limits.items()
        ]

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
            UsageError: if a setting has another form, its pattern matches no trained parameter with vectors,
                or the weights are sharded.
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
            matching = matching_names("max_norm", pattern, trained)
            names = [name for name in matching if trained[name].ndim > 1]
            if not names:
                raise UsageError(
                    f"max_norm pattern {pattern!r} matches only parameters with one dimension, such as "
                    f"{matching[0]}, which have no vectors; limit for instance 'head.weight'"
                )
            for name in names:
                norms = _norms(trained[name], _dimension(network, name))
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
        for value, dimension, limit in self._limited:
            norms = _norms(value, dimension).clamp_min(torch.finfo(value.dtype).tiny)
            factors = (limit / norms).clamp_max(1).to(value)
            value.movedim(dimension, -1).mul_(factors)


def _dimension(network: Classifier, name: str) -> int:
    """Return the dimension of a parameter that numbers its vectors."""
    return int(name == "head.weight" and isinstance(network.head, CosineHead))  # [D, C]


def _norms(value: Tensor, dimension: int) -> Tensor:
    vectors = at_least_float32(value.detach()).movedim(dimension, 0)
    norms: Tensor = torch.linalg.vector_norm(vectors.reshape(len(vectors), -1), dim=1)
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
