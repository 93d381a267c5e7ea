"""Base class of variants that add random noise to weights or gradients."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed import is_sharded
from fastsam.optim._engine.autocast import weights_change
from fastsam.optim._engine.base_optimizer import refuse_unusable
from fastsam.optim.variants.base import Option, WrappedOptimizer

SEED = Option(high=2**63 - 1, whole=True)
"""Seed of a variant's noise."""

Trained = list[tuple[dict[str, Any], Tensor]]
"""The trainable parameters, each with its group."""


class NoisyOptimizer(WrappedOptimizer, ABC):
    """Base class of variants that add random noise to weights or gradients.

    The noise of an element depends on its position in its tensor. Ranks that hold shards of a parameter would
    all add the same noise to different elements, so DTensor parameters are refused.
    """

    @classmethod
    def _check(cls, optimizer: Optimizer, options: Mapping[str, Any]) -> None:
        refuse_unusable(type(optimizer))
        super()._check(optimizer, options)
        cls._refuse_sharded(p for group in optimizer.param_groups for p in group["params"])

    @classmethod
    def _refuse_sharded(cls, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            if is_sharded(parameter):
                raise ValueError(
                    f"{cls.__name__} got a DTensor parameter of shape {tuple(parameter.shape)}; its noise "
                    "requires whole parameters on every rank. Train with DistributedDataParallel instead of "
                    "FSDP2 or tensor parallelism, or choose SAM, which works with DTensor parameters"
                )

    def _trained(self) -> Trained:
        """Return every trainable parameter with its group, for the passes of one step.

        Raises:
            ValueError: a parameter is a DTensor, because the model was sharded after the construction.
        """
        trained = list(self._parameters())
        self._refuse_sharded(parameter for _, parameter in trained)
        return trained

    def _by_group(
        self, trained: Trained, deviation: Callable[[dict[str, Any]], float]
    ) -> list[Tensor]:
        """Return a standard deviation per parameter: float64 ``[1]``, shared within a group."""
        values = {
            id(group): torch.tensor([deviation(group)], dtype=torch.float64, device="cpu")
            for group in self.param_groups
        }
        return [values[id(group)] for group, _ in trained]


def restore(trained: Trained, before: Sequence[Tensor]) -> None:
    """Copy the weights from before the passes back into the parameters."""
    with weights_change():
        for (_, parameter), old in zip(trained, before, strict=True):
            parameter.copy_(old)
