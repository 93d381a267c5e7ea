"""How the network of a run is judged, while it trains and afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsam.distributed import World
from fastsam.longtail.classes import adjust_logits
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.metrics import Metrics, evaluate
from fastsam.longtail.models.classifier import Classifier
from fastsam.longtail.predictions import Predictions, predict


@dataclass
class Judge:
    """Judges a network on the images of a data set.

    Attributes:
        network: the network, at its weights of the moment.
        data: the data set, for its groups and counts.
        logit_scale: logit scale of the loss.
        posthoc_tau: strength of the post-hoc logit adjustment; 0 for none.
        batch_size: images in a batch of one process.
        device: where the network is.
        world: this process among those that share the work.
    """

    network: Classifier
    data: LongTailData
    logit_scale: float
    posthoc_tau: float
    batch_size: int
    device: torch.device
    world: World = field(default_factory=World)

    def predictions(self, images: Images) -> Predictions:
        """Predictions for all images that can be read; for selecting and for judging alike."""
        return predict(
            self.network,
            images,
            self.device,
            batch_size=self.batch_size,
            adjust=self._adjusted,
            world=self.world,
        )

    def metrics(self, images: Images) -> Metrics:
        """Accuracy and calibration on ``images``."""
        return evaluate(self.predictions(images), self.data.groups, self.data.counts)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Logits ``[B, C]`` as the loss scales them, with the post-hoc adjustment."""
        logits = self.logit_scale * logits
        tau = self.posthoc_tau
        return adjust_logits(logits, self.data.counts, tau) if tau else logits
