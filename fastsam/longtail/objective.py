"""The objective of a run: terms that turn outputs of the network into one loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsam.longtail.data.batch import Batch
from fastsam.longtail.errors import unknown
from fastsam.longtail.models.classifier import Classifier, Outputs

Reduce = Callable[[Tensor], Tensor]
"""Sums a scalar over all ranks."""


class Given(NamedTuple):
    """What a term is given besides outputs and batch.

    Attributes:
        network: the network, at the weights of this pass.
        prepared: what :meth:`Term.prepare` returned for the batch.
        factors: factor on the loss of each class, ``[C]``, which may be negative and does not enter
            the divisor; None for 1.
    """

    network: Classifier
    prepared: Any = None
    factors: Tensor | None = None


class Term(nn.Module):
    """A term of the objective.

    Attributes:
        views: how many augmented views of each image the term reads.
        couples_batch: whether the loss of a sample depends on other samples, so that a batch must
            not be shared out among ranks.
        logit_scale: factor on logits inside the loss. Multiply logits by it before a softmax.
    """

    views: int = 1
    couples_batch: bool = False
    logit_scale: float = 1.0

    def prepare(self, batch: Batch, network: Classifier, seed: int) -> Any:
        """Compute what all passes of a step over ``batch`` share, such as keys or a mask.

        It is called once for each batch of a step, without gradient, before the first pass.

        Args:
            batch: the batch, or the part of one that a pass reads.
            network: the network, at the weights before the step.
            seed: seed of this batch.

        Returns:
            Whatever :meth:`loss` and :meth:`commit` need; they are given it.
        """
        return None

    def loss(self, outputs: Outputs, batch: Batch, given: Given) -> tuple[Tensor, Tensor]:
        """Return the sum of the samples' losses and what to divide it by, both scalars.

        Args:
            outputs: what the network makes of the first view.
            batch: the batch.
            given: what else this pass has.
        """
        raise NotImplementedError

    def commit(self, batch: Batch, network: Classifier, prepared: Any) -> None:
        """Update queues or averages after a step. A skipped step undoes it."""


def _always(epoch: int) -> float:
    return 1.0


@dataclass(frozen=True)
class WeightedTerm:
    """A term and its weight in the objective.

    Attributes:
        term: the term.
        weight: weight in an epoch, counted from 1. Where it is 0 the term is not computed.
    """

    term: Term
    weight: Callable[[int], float] = _always


@dataclass(frozen=True)
class Objective:
    """The loss of every epoch of a run.

    Attributes:
        terms: the terms; at least one has a weight other than 0 in every epoch.
        weightings: factors on the loss of each class, float64 ``[C]``, by the name that an optimizer
            asks for; ``all`` needs none.
    """

    terms: Sequence[WeightedTerm]
    weightings: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def views(self) -> int:
        """How many augmented views of each image are read."""
        return max(weighted.term.views for weighted in self.terms)

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of a sample depends on other samples of its batch."""
        return any(weighted.term.couples_batch for weighted in self.terms)

    @property
    def logit_scale(self) -> float:
        """Logit scale of the loss. Multiply logits by it before softmax."""
        return self.terms[-1].term.logit_scale

    def at(self, epoch: int) -> list[tuple[Term, float]]:
        """The terms of an epoch (counted from 1) with their weights."""
        weights = ((item.term, item.weight(epoch)) for item in self.terms)
        return [(term, weight) for term, weight in weights if weight != 0]

    def prepare(self, batch: Batch, network: Classifier, *, epoch: int, seed: int) -> list[Any]:
        """Call :meth:`Term.prepare` of every term of an epoch."""
        with torch.no_grad():
            return [term.prepare(batch, network, seed) for term, _ in self.at(epoch)]

    def loss(
        self,
        outputs: Outputs,
        batch: Batch,
        network: Classifier,
        *,
        epoch: int,
        prepared: Sequence[Any],
        weighting: str = "all",
        reduce: Reduce = lambda weight: weight,
    ) -> Tensor:
        """The weighted sum of the terms, each a sum of losses over a sum of weights.

        Args:
            outputs: what the network makes of the first view of ``batch``.
            batch: the batch, this rank's share of it.
            network: the network.
            epoch: counted from 1.
            prepared: what :meth:`prepare` returned for this batch.
            weighting: ``all``, or a name of ``weightings``.
            reduce: sums the divisor over all ranks.
        """
        factors = self._factors(weighting)
        total: Tensor | None = None
        for (term, weight), shared in zip(self.at(epoch), prepared, strict=True):
            losses, divisor = term.loss(outputs, batch, Given(network, shared, factors))
            value = losses / reduce(divisor.detach().clone())
            value = value if weight == 1 else weight * value
            total = value if total is None else total + value
        if total is None:
            raise AssertionError("no term has a weight in this epoch")
        return total

    def commit(
        self, batch: Batch, network: Classifier, *, epoch: int, prepared: Sequence[Any]
    ) -> None:
        """Call :meth:`Term.commit` of every term of an epoch."""
        for (term, _), shared in zip(self.at(epoch), prepared, strict=True):
            term.commit(batch, network, shared)

    def _factors(self, weighting: str) -> Tensor | None:
        if weighting == "all":
            return None
        if weighting not in self.weightings:
            raise unknown("weighting", weighting, ("all", *self.weightings))
        return self.weightings[weighting]


def group_weightings(
    groups: Mapping[str, Sequence[int]], counts: NDArray[np.int64], device: torch.device
) -> dict[str, Tensor]:
    """Factors of 1 on the classes of a group and 0 elsewhere, by the name of the group.

    Args:
        groups: classes of head, mid and tail.
        counts: training images of each class, ``[C]``.
        device: where the factors are needed.
    """
    factors = {}
    for name, members in groups.items():
        factors[name] = torch.zeros(len(counts), dtype=torch.float64, device=device)
        factors[name][list(members)] = 1.0
    return factors
