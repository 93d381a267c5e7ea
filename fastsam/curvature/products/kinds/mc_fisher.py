"""A Monte Carlo estimate of the Fisher matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsam.curvature.criteria import is_likelihood
from fastsam.curvature.products.factored import criterion_of, losses_graph
from fastsam.curvature.products.graphs import Graph, GraphBuilder
from fastsam.curvature.products.kinds.kind import Kind, register_kind
from fastsam.curvature.products.pure import PureLoss


def sampled_fisher(seed: int) -> GraphBuilder:
    """Return :func:`fisher_graph` with targets drawn from the model's predictive distribution."""

    def build(loss: PureLoss, batch: Any, number: int) -> Graph:
        form = criterion_of(loss)
        criterion = form.criterion
        if (
            not isinstance(criterion, nn.CrossEntropyLoss)
            or not is_likelihood(criterion)
            or criterion.label_smoothing
        ):
            raise ValueError(
                "mc-fisher samples classes from a softmax, so it requires nn.CrossEntropyLoss without "
                f"label smoothing and without an overridden forward, got {criterion}"
            )
        targets = form.targets(batch)
        if targets.is_floating_point():
            raise ValueError("mc-fisher requires class indices as targets, got class probabilities")
        outputs = loss.call("outputs", loss.leaves(), batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"kind 'mc-fisher' requires one tensor of outputs, got {type(outputs).__name__}; select it "
                "with fastsam.curvature.OutputLoss"
            )
        outputs = outputs.detach()
        probabilities = outputs.movedim(1, -1).softmax(dim=-1).reshape(-1, outputs.shape[1]).cpu()
        state = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint32)[0])
        generator = torch.Generator().manual_seed(state)
        drawn = torch.multinomial(probabilities.double(), 1, generator=generator)
        return losses_graph(loss, batch, drawn.reshape(targets.shape).to(targets))

    return build


register_kind(
    Kind(
        name="mc-fisher",
        summary=(
            "as empirical-fisher, with one target per sample drawn from the "
            "model's predictive distribution: an unbiased estimate of the Fisher matrix"
        ),
        builder=sampled_fisher,
        is_random=True,
    )
)
