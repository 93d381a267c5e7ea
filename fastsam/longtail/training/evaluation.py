"""Evaluation of a network during and after training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsam.distributed import World
from fastsam.longtail.classes import adjust_logits
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.metrics import Metrics, evaluate
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.objective import Objective
from fastsam.longtail.precision import Precision
from fastsam.longtail.predictions import Predictions, predict
from fastsam.longtail.sharding import drop_gathered


@dataclass
class Judge:
    """Evaluates a network at its current weights.

    Attributes:
        network: the network.
        data: the data set, for its groups and class counts.
        logit_scale: logit scale of the loss.
        posthoc_tau: factor of the post-hoc logit adjustment; 0 for none.
        batch_size: images per batch and process.
        device: device of the network.
        precision: precision of the forward passes.
        world: the ranks that share the work.
    """

    network: Classifier
    data: LongTailData
    logit_scale: float
    posthoc_tau: float
    batch_size: int
    device: torch.device
    precision: Precision = "float32"
    world: World = field(default_factory=World)

    @classmethod
    def of_run(
        cls,
        config: TrainConfig,
        network: Classifier,
        data: LongTailData,
        objective: Objective,
        device: torch.device,
        world: World,
    ) -> Judge:
        """Create the evaluation of a run."""
        return cls(
            network,
            data,
            logit_scale=objective.logit_scale,
            posthoc_tau=config.posthoc_tau,
            batch_size=config.batch_size // world.world_size,
            device=device,
            precision=config.precision,
            world=world,
        )

    def predictions(self, images: Images) -> Predictions:
        """Compute predictions for all readable images. Epoch selection and final evaluation both use it."""
        found = predict(
            self.network,
            images,
            self.device,
            batch_size=self.batch_size,
            adjust=self._adjusted,
            precision=self.precision,
            world=self.world,
        )
        drop_gathered(self.network)
        return found

    def metrics(self, images: Images) -> Metrics:
        """Compute the metrics on ``images``."""
        return evaluate(self.predictions(images), self.data.groups, self.data.counts)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Apply the logit scale and the post-hoc adjustment to logits ``[B, C]``."""
        logits = self.logit_scale * logits
        tau = self.posthoc_tau
        return adjust_logits(logits, self.data.counts, tau) if tau else logits
