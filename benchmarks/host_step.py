"""Seconds of a step of the trainer outside the network and the optimizer. ``host_work`` runs it as a script.

It imports nothing from benchmarks, so that it can also measure the ``fastsam`` of an earlier checkout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from fastsam import SAM
from fastsam.distributed import World
from fastsam.longtail import recipe
from fastsam.longtail.build import build_objective
from fastsam.longtail.data import Batch
from fastsam.longtail.models import Classifier
from fastsam.longtail.models.classifier import Outputs
from fastsam.longtail.training.step import Stepper

CLASSES, BATCH = 10, 8


class Clock:
    """Adds up the time of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, *names: str) -> None:
        """Time the functions of ``owner`` with these names, as far as it has them."""
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments, **options)
            self.seconds += time.thread_time() - began
            return result

        return call


class Pixels(Classifier):
    """Classifies the first pixels of an image, and has layers that it does not use."""

    def outputs(self, inputs: Tensor) -> Outputs:
        features = inputs.flatten(1)[:, :CLASSES]
        return Outputs(features, self.head(features))


def timed_step(optimizer: str) -> tuple[Callable[[], object], Clock]:
    """Return a step of the trainer, and the clock of its network, backward passes and optimizer."""
    layers = ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=4)
    layers.fc = nn.Identity()
    network = Pixels(layers, nn.Linear(CLASSES, CLASSES), CLASSES)
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sgd = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    made = sgd if optimizer == "sgd" else SAM(optimizer=sgd, rho=0.05)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in network.head.parameters():
            parameter.grad = None

    made.zero_grad = zero_grad  # type: ignore[method-assign]
    clock = Clock()
    clock.wrap(network, "outputs")
    clock.wrap(Tensor, "backward")
    clock.wrap(made, "first_step", "second_step", "step")
    objective = build_objective(recipe("digits-lt", "ce", "sgd").config(), np.full(CLASSES, 100))
    stepper = Stepper(_engine(network), made, objective, seed=0)
    indices = torch.arange(BATCH)
    batch = Batch((torch.randn(BATCH, 3, 4, 4),), indices % CLASSES, indices)
    return lambda: next(stepper.steps([batch], epoch=1)), clock


def _engine(network: Classifier) -> Any:
    """Return what ``Stepper`` trains: before it had engines, it was the network itself."""
    if "engine" not in Stepper.__dataclass_fields__:
        return network
    from fastsam.longtail.training.engine import Engine

    return Engine(network, World())


def main() -> None:
    """Print the mean seconds of a step for each line of standard input, which is a number of steps."""
    torch.set_num_threads(1)
    step, clock = timed_step(sys.argv[1])
    for line in sys.stdin:
        clock.seconds, began = 0.0, time.thread_time()
        for _ in range(int(line)):
            step()
        seconds = time.thread_time() - began - clock.seconds
        print(seconds / int(line), flush=True)


if __name__ == "__main__":
    main()
