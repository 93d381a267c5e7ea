"""Parametric contrastive learning (PaCo): class centers and a queue of keys in one softmax.

Cui et al., "Parametric Contrastive Learning" (ICCV 2021), section 3.3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.classes import prior
from fastsam.longtail.data.batch import Batch
from fastsam.longtail.losses.base import (
    ClassStatistics,
    Loss,
    check_number,
    check_targets,
    register_loss,
)
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.objective import Given, Term
from fastsam.longtail.precision import at_least_float32
from fastsam.longtail.settings import Entry, Settings, setting


class PaCoLoss(Term):
    """PaCo loss: the positives of a sample are the center of its class and the samples of its class.

    One softmax runs over C class centers, with logits ``z + log(prior)``, and over M contrasts (other
    samples), with logits ``q . k / temperature``. The sample itself is masked. The loss of a sample is minus
    the weighted mean log-probability of its positives: the center has weight ``beta``, each contrast of the
    same class has weight ``alpha``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        alpha: weight of a contrast of the same class; 0.01 for CIFAR-100-LT, 0.05 for ImageNet-LT.
        beta: weight of the center, above 0; 1 in the authors' code.
        temperature: temperature of the contrasts; 0.05 for CIFAR-100-LT, 0.2 for ImageNet-LT.
    """

    views = 2
    couples_batch = True
    log_prior: Tensor

    def __init__(
        self,
        counts: ArrayLike,
        *,
        alpha: float = 0.01,
        beta: float = 1.0,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        check_number("alpha", alpha)
        for name, value in (("beta", beta), ("temperature", temperature)):
            check_number(name, value, positive=True)
        self.register_buffer("log_prior", prior(counts).log())
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        queries: Tensor,
        contrasts: Tensor,
        contrast_targets: Tensor,
    ) -> Tensor:
        """Return the mean loss of a batch; see :meth:`per_sample` for the arguments."""
        return self.per_sample(logits, targets, queries, contrasts, contrast_targets).mean()

    def per_sample(
        self,
        logits: Tensor,
        targets: Tensor,
        queries: Tensor,
        contrasts: Tensor,
        contrast_targets: Tensor,
    ) -> Tensor:
        """Return the loss of every sample, ``[B]``.

        Args:
            logits: logits of the classifier, ``[B, C]``.
            targets: int64 ``[B]``.
            queries: unit vectors of the batch, ``[B, P]``.
            contrasts: unit vectors to compare with, ``[M, P]``; the first B are ``queries``.
            contrast_targets: classes of the contrasts, int64 ``[M]``; -1 marks an empty entry of the queue,
                which is masked.
        """
        targets = check_targets(logits, targets)
        batch, classes = logits.shape
        similarity = queries @ contrasts.T / self.temperature
        own = torch.eye(batch, len(contrasts), dtype=torch.bool, device=logits.device)
        absent = own | (contrast_targets < 0)
        everything = torch.cat(
            [logits + self.log_prior.to(logits), similarity.masked_fill(absent, -math.inf)], dim=1
        )
        log_probability = everything.log_softmax(dim=1)
        same = (targets[:, None] == contrast_targets) & ~own
        center = functional.one_hot(targets, classes).to(logits)
        positives = torch.cat([self.beta * center, self.alpha * same.to(logits)], dim=1)
        # Masked entries have log-probability -inf, and 0 * -inf is NaN.
        weighted = torch.where(positives > 0, positives * log_probability, 0.0)
        return -(weighted.sum(dim=1) / positives.sum(dim=1))

    def prepare(self, batch: Batch, network: Classifier, seed: int) -> Tensor:
        """Compute the keys of the second view, ``[B, P]``, which all passes of the step share."""
        return at_least_float32(_paco(network).keys(batch.views[1]))

    def loss(self, outputs: Outputs, batch: Batch, given: Given) -> Tensor:
        """See :meth:`Term.loss`. The contrasts are the batch itself, its keys and the queue."""
        queries, queue = outputs.projections, _paco(given.network)
        if queries is None:
            raise AssertionError("a PaCoClassifier returns projections")
        losses = self.per_sample(
            at_least_float32(outputs.logits),
            batch.targets,
            queries,
            torch.cat([queries, given.prepared, queue.queue.to(queries)]),
            torch.cat([batch.targets, batch.targets, queue.queue_targets]),
        )
        if given.factors is not None:
            losses = losses * given.factors.to(losses)[batch.targets]
        return losses.sum()

    def commit(self, batch: Batch, network: Classifier, prepared: Any) -> None:
        """Update the momentum encoder and add the keys to the queue."""
        _paco(network).advance(prepared, batch.targets)


class PaCoClassifier(Classifier):
    """A classifier with a projection, a momentum encoder, and a queue of keys.

    The momentum encoder is a moving average of the feature extractor and the projection.

    Args:
        classifier: feature extractor and head.
        projection: length P of the projected vectors; 32 for CIFAR, 128 for large images.
        queue: length of the queue; 1024 for CIFAR-100-LT, 8192 for ImageNet-LT.
        batch_norm: apply batch normalization in the hidden layer of the projection, as in the code of Cui et
            al. 2021.
        momentum: momentum of the moving average; 0.999 as in He et al. (CVPR 2020).
    """

    forward_methods = ("outputs", "keys")
    run_buffers = ("queue", "queue_targets", "queue_place")
    queue: Tensor
    queue_targets: Tensor
    queue_place: Tensor

    def __init__(
        self,
        classifier: Classifier,
        *,
        projection: int = 32,
        queue: int = 1024,
        batch_norm: bool = True,
        momentum: float = 0.999,
    ) -> None:
        width = classifier.feature_width
        super().__init__(classifier.features, classifier.head, width)
        norm = [nn.BatchNorm1d(width)] if batch_norm else []
        self.projection = nn.Sequential(
            nn.Linear(width, width), *norm, nn.ReLU(), nn.Linear(width, projection)
        )
        self.key_encoder = copy.deepcopy(
            nn.Sequential(self.features, self.projection)
        ).requires_grad_(requires_grad=False)
        self.momentum = momentum
        self.register_buffer("queue", torch.zeros(queue, projection))
        self.register_buffer("queue_targets", torch.full((queue,), -1))
        self.register_buffer("queue_place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def adopt(self, loaded: Collection[str]) -> None:
        """Copy the feature extractor and the projection to a momentum encoder that was not loaded."""
        if not any(name.startswith("key_encoder.") for name in loaded):
            trained = nn.Sequential(self.features, self.projection)
            self.key_encoder.load_state_dict(trained.state_dict())

    def queries(self, features: Tensor) -> Tensor:
        """Project features ``[B, D]`` to unit vectors ``[B, P]``."""
        return functional.normalize(self.projection(features), dim=1)

    @torch.no_grad()
    def keys(self, inputs: Tensor) -> Tensor:
        """Encode images ``[B, channels, H, W]`` as unit vectors ``[B, P]`` with the momentum encoder."""
        return functional.normalize(self.key_encoder(inputs), dim=1)

    def outputs(self, inputs: Tensor) -> Outputs:
        """See :meth:`Classifier.outputs`. Projections are not computed in 16 bits under autocast."""
        outputs = super().outputs(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            return outputs._replace(projections=self.queries(at_least_float32(outputs.features)))

    @torch.no_grad()
    def advance(self, keys: Tensor, targets: Tensor) -> None:
        """Update the momentum encoder and add the keys to the queue. Call it once a step.

        Args:
            keys: ``[B, P]``; if B exceeds the length of the queue, the last keys are kept.
            targets: classes of the keys, int64 ``[B]``.
        """
        trained = [*self.features.parameters(), *self.projection.parameters()]
        for slow, fast in zip(self.key_encoder.parameters(), trained, strict=True):
            slow.lerp_(fast, 1 - self.momentum)
        size = len(self.queue)
        keys, targets = keys[-size:], targets[-size:]
        places = (self.queue_place + torch.arange(len(keys), device=keys.device)) % size
        self.queue[places] = keys.to(self.queue)
        self.queue_targets[places] = targets
        self.queue_place.copy_((self.queue_place + len(keys)) % size)


def _paco(network: Classifier) -> PaCoClassifier:
    if not isinstance(network, PaCoClassifier):
        raise AssertionError("the loss paco requires a PaCoClassifier")
    return network


_SOURCE = "code of Cui et al. 2021"
_CIFAR100 = f"{_SOURCE} (CIFAR-100-LT)"


@dataclass(frozen=True, kw_only=True)
class PaCoSettings(Settings):
    """Settings of PaCo."""

    paco_alpha: float = setting(
        "weight of a sample of the same class in the PaCo loss; the class center has weight 1",
        default=Entry(0.01, _CIFAR100, known=False),
        low=0,
    )
    paco_temperature: float = setting(
        "temperature of the contrasts in the PaCo loss",
        default=Entry(0.05, _CIFAR100, known=False),
        above=0,
    )
    paco_queue: int = setting(
        "number of keys in PaCo's queue",
        default=Entry(1024, _CIFAR100, known=False),
        low=1,
        high=2**20,
    )
    paco_projection: int = setting(
        "dimension of PaCo's projected vectors",
        default=Entry(32, _CIFAR100, known=False),
        low=1,
        high=2**14,
    )
    paco_batch_norm: bool = setting(
        "use batch normalization in PaCo's projection", default=Entry(True, _SOURCE), before=False
    )


def _build(settings: PaCoSettings, classes: ClassStatistics) -> PaCoLoss:
    return PaCoLoss(
        classes.counts, alpha=settings.paco_alpha, temperature=settings.paco_temperature
    )


def _network(settings: PaCoSettings, classifier: Classifier) -> PaCoClassifier:
    return PaCoClassifier(
        classifier,
        projection=settings.paco_projection,
        queue=settings.paco_queue,
        batch_norm=settings.paco_batch_norm,
    )


register_loss(
    Loss(
        name="paco",
        build=_build,
        settings=PaCoSettings,
        summary="parametric contrastive learning with momentum encoder and queue",
        balances_classes=True,
        adjusts_logits=lambda settings: "log prior (centers of paco)",
        network=_network,
    )
)
