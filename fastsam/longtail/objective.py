"""The objective of a run: a weighted sum of loss terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsam.kernels.backends import sum_dtype
from fastsam.longtail.data.batch import Batch
from fastsam.longtail.errors import unknown
from fastsam.longtail.models.classifier import Classifier, Outputs


class Given(NamedTuple):
    """Inputs of a term besides outputs and batch.

    Attributes:
        network: the network, at the weights of this pass.
        prepared: return value of :meth:`Term.prepare` for the batch.
        factors: factor on the loss of each class, ``[C]``; None for 1. A factor may be negative, and does not
            enter the divisor.
        shares: factor on the loss of each sample, ``[B]``; None for 1. It does not enter the divisor. Only a
            term with :attr:`Term.mixes` receives shares.
    """

    network: Classifier
    prepared: Any = None
    factors: Tensor | None = None
    shares: Tensor | None = None


class Term(nn.Module):
    """Base class of the terms of an objective.

    Attributes:
        views: number of augmented views of each image that the term reads.
        couples_batch: whether the loss of a sample depends on other samples. On several ranks, such a term
            receives the outputs, the batch (without views) and the prepared value of all ranks. Its
            :meth:`prepare` must return None or a tensor with a row for each sample.
        mixes: whether :meth:`loss` multiplies the loss of each sample by :attr:`Given.shares`. Images can be
            mixed only if all terms do.
        logit_scale: factor on logits inside the loss. Multiply logits by it before softmax.
    """

    views: int = 1
    couples_batch: bool = False
    mixes: bool = False
    logit_scale: float = 1.0

    def prepare(self, batch: Batch, network: Classifier, seed: int) -> Any:
        """Compute values that all passes of a step share, such as keys or a mask.

        It is called once for each batch of a step, before the first pass and without gradients.

        Args:
            batch: the batch, or the part of it that a pass reads.
            network: the network, at the weights before the step.
            seed: seed of this batch.

        Returns:
            Any value. :meth:`loss` and :meth:`commit` receive it.
        """
        return None

    @property
    def prepares(self) -> bool:
        """Whether the term overrides :meth:`prepare`."""
        return type(self).prepare is not Term.prepare

    def divisor(self, batch: Batch) -> Tensor:
        """Return what the sum of the losses is divided by, a scalar; by default the number of samples.

        It does not depend on the network: it is known before the forward pass, and all passes of a step share
        it.

        Args:
            batch: the batch, or a rank's part of it.
        """
        targets = batch.targets
        # torch.tensor() would copy from the host and synchronize with the GPU.
        return torch.full((), len(targets), dtype=torch.float32, device=targets.device)

    def loss(self, outputs: Outputs, batch: Batch, given: Given) -> Tensor:
        """Compute the sum of the samples' losses, a scalar.

        Args:
            outputs: outputs of the network for the first view.
            batch: the batch.
            given: further inputs of this pass.
        """
        raise NotImplementedError

    def commit(self, batch: Batch, network: Classifier, prepared: Any) -> None:
        """Update queues or averages after a step. The trainer undoes the update if the step is skipped."""


def _always(epoch: int) -> float:
    return 1.0


@dataclass(frozen=True)
class WeightedTerm:
    """A term and its weight in the objective.

    Attributes:
        term: the term.
        weight: function from epoch (counted from 1) to weight. A term of weight 0 is not computed.
    """

    term: Term
    weight: Callable[[int], float] = _always


@dataclass(frozen=True)
class Objective:
    """The objective of a run: the loss in every epoch.

    Attributes:
        terms: the terms. In every epoch at least one must have a nonzero weight.
        weightings: factors on the loss of each class, float64 ``[C]``, by the name that an optimizer
            requests. The name ``all`` stands for no factors.
    """

    terms: Sequence[WeightedTerm]
    weightings: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def views(self) -> int:
        """Number of augmented views of each image that the terms read."""
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
        """Return the terms of an epoch (counted from 1) with their weights."""
        weights = ((item.term, item.weight(epoch)) for item in self.terms)
        return [(term, weight) for term, weight in weights if weight != 0]

    def prepare(
        self, batch: Batch, network: Classifier, *, epoch: int, seed: Callable[[], int]
    ) -> list[Any]:
        """Call :meth:`Term.prepare` of every term of an epoch.

        Args:
            batch: this rank's part of the batch.
            network: the network, at the weights before the step.
            epoch: epoch, counted from 1.
            seed: returns the seed of this batch. It is called only for terms that prepare something.
        """
        terms = [term for term, _ in self.at(epoch)]
        if not any(term.prepares for term in terms):
            return [None] * len(terms)
        with torch.no_grad():
            return [
                term.prepare(batch, network, seed()) if term.prepares else None for term in terms
            ]

    def divisors(self, batch: Batch, *, epoch: int) -> Tensor:
        """Return :meth:`Term.divisor` of every term of an epoch, in the dtype of sums.

        Returns:
            ``[terms]``; ``[2 terms]`` for mixed images, first those of ``targets``, then those of ``second``.
        """
        dtype = sum_dtype(batch.targets.device, torch.float32)
        return torch.stack(
            [
                term.divisor(part).to(dtype)
                for part, _ in batch.parts_by_target()
                for term, _ in self.at(epoch)
            ]
        )

    def loss(
        self,
        outputs: Outputs,
        batch: Batch,
        network: Classifier,
        *,
        epoch: int,
        prepared: Sequence[Any],
        weighting: str = "all",
        divisors: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted sum of the terms, each a sum of losses over its divisor.

        For mixed images, each term is the sum of two such quotients: of the losses by ``targets``, multiplied
        by their shares, and of the losses by ``second``, multiplied by the rest.

        Args:
            outputs: outputs of the network for the first view of ``batch``.
            batch: this rank's part of the batch.
            network: the network.
            epoch: epoch, counted from 1.
            prepared: return value of :meth:`prepare` for this batch.
            weighting: ``all``, or a name in ``weightings``.
            divisors: see :meth:`divisors`; None for those of ``batch``.
        """
        divisors = self.divisors(batch, epoch=epoch) if divisors is None else divisors
        factors = self._factors(weighting)
        total: Tensor | None = None
        terms = zip(self.at(epoch), prepared, strict=True)
        parts = product(batch.parts_by_target(), terms)
        for ((part, shares), ((term, weight), shared)), divisor in zip(
            parts, divisors.unbind(), strict=True
        ):
            losses = term.loss(outputs, part, Given(network, shared, factors, shares))
            value = losses / divisor.to(losses)
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
    """Return factors that are 1 for the classes of a group and 0 for others, by name of the group.

    Args:
        groups: classes of head, mid and tail.
        counts: training images of each class, ``[C]``.
        device: device of the factors.
    """
    factors = {}
    for name, members in groups.items():
        factors[name] = torch.zeros(len(counts), dtype=torch.float64, device=device)
        factors[name][list(members)] = 1.0
    return factors
