"""Parametric contrastive learning (PaCo): class centres and a queue of keys in one softmax.

Cui et al., "Parametric Contrastive Learning" (ICCV 2021), section 3.3.
"""

from __future__ import annotations

import copy
import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import check_targets, prior
from fastsam.longtail.models import Classifier


class PaCoLoss(nn.Module):
    """The contrastive loss whose positives are the class centre and the samples of the same class.

    One softmax runs over C centres, with logits ``z + log(prior)``, and over contrasted samples,
    with logits ``q . k / temperature``; the anchor itself is left out. The loss of a sample is minus
    the mean log-probability of its positives: the centre with weight ``beta``, each contrasted
    sample of its class with weight ``alpha``.

    Args:
        counts: training images of each class, ``[C]``, each at least 1.
        alpha: weight of a contrasted positive; 0.01 for CIFAR-100-LT, 0.05 for ImageNet-LT.
        beta: weight of the centre; 1.
        temperature: of the contrasts; 0.05 for CIFAR-100-LT, 0.2 for ImageNet-LT.
    """

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
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} must be at least 0, got {value}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise UsageError(f"temperature must be above 0, got {temperature}")
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
        """The mean loss of a batch.

        Args:
            logits: of the classifier, ``[B, C]``.
            targets: int64 ``[B]``.
            queries: unit vectors of the batch, ``[B, P]``.
            contrasts: unit vectors to compare with, ``[M, P]``; the first B are ``queries``.
            contrast_targets: classes of the contrasts, int64 ``[M]``; -1 for an empty place of the
                queue, which is left out.
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
        centre = functional.one_hot(targets, classes).to(logits)
        positives = torch.cat([self.beta * centre, self.alpha * same.to(logits)], dim=1)
        # Where the weight is 0 the logarithm may be -inf, and 0 * -inf is not 0.
        weighted = torch.where(positives > 0, positives * log_probability, 0.0)
        return -(weighted.sum(dim=1) / positives.sum(dim=1)).mean()


class PaCoClassifier(Classifier):
    """A classifier with a projection, a momentum copy of both, and a queue of keys.

    Args:
        classifier: features and head.
        projection: length P of the projected vectors; 32 for CIFAR, 128 for large images.
        queue: places in the queue; 1024 for CIFAR-100-LT, 8192 for ImageNet-LT.
        batch_norm: normalize the hidden layer of the projection over the batch, as the code of Cui et
            al. 2021 does.
        momentum: of the copy; 0.999 as in He et al. (CVPR 2020).
    """

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

    def queries(self, features: Tensor) -> Tensor:
        """Unit vectors ``[B, P]`` of features ``[B, D]``."""
        return functional.normalize(self.projection(features), dim=1)

    @torch.no_grad()
    def keys(self, inputs: Tensor) -> Tensor:
        """Unit vectors ``[B, P]`` of another view of the images, by the momentum copy."""
        return functional.normalize(self.key_encoder(inputs), dim=1)

    def contrast(
        self, loss_fn: PaCoLoss, logits: Tensor, features: Tensor, keys: Tensor, targets: Tensor
    ) -> Tensor:
        """The loss of a batch against itself, the keys of its other view, and the queue."""
        queries = self.queries(features)
        return loss_fn(  # type: ignore[no-any-return]
            logits,
            targets,
            queries,
            torch.cat([queries, keys, self.queue.to(queries)]),
            torch.cat([targets, targets, self.queue_targets]),
        )

    @torch.no_grad()
    def advance(self, keys: Tensor, targets: Tensor) -> None:
        """Once a step: move the copy towards the network and put the keys into the queue.

        Args:
            keys: ``[B, P]``; at most as many as the queue has places are kept.
            targets: their classes, int64 ``[B]``.
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
