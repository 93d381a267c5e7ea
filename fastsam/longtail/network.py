"""From the settings of a run to its network."""

from __future__ import annotations

import torch
from torch import nn

from fastsam.longtail.config import TrainConfig, given
from fastsam.longtail.contrastive import PaCoClassifier
from fastsam.longtail.models import Classifier, build_model
from fastsam.longtail.seeds import Stream, derived_seed, global_seed


def build_network(config: TrainConfig, num_classes: int, channels: int) -> Classifier:
    """The freshly initialised network of a configuration, on the CPU.

    Args:
        config: settings of the run.
        num_classes: number of classes C.
        channels: channels of the input images.
    """
    seed = derived_seed(config.seed, Stream.MODEL)
    model = build_model(
        config.model,
        num_classes,
        head=config.head,
        head_init=config.head_init,
        channels=channels,
        seed=seed,
    )
    if config.parsed_method.loss != "paco":
        return model
    with global_seed(seed):
        return PaCoClassifier(
            model,
            projection=given(config.paco_projection),
            queue=given(config.paco_queue),
            batch_norm=given(config.paco_batch_norm),
        )


def not_finite(model: nn.Module) -> str | None:
    """The first parameter or running statistic with an infinite value or NaN; None if there is none.

    Waits for the device once.
    """
    statistics = ("running_mean", "running_var")
    values = {
        **dict(model.named_parameters()),
        **{name: v for name, v in model.named_buffers() if name.endswith(statistics)},
    }
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    return next((name for name, good in zip(values, finite, strict=True) if not good), None)
