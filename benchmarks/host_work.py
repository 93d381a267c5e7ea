"""Work of the host in a step of the trainer, outside the passes and the optimizer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from benchmarks.machine import save
from fastsam import SAM
from fastsam.distributed import World
from fastsam.longtail import recipe
from fastsam.longtail.build import build_objective
from fastsam.longtail.data import Batch
from fastsam.longtail.models import Classifier
from fastsam.longtail.models.classifier import Outputs
from fastsam.longtail.training import Engine, Stepper
from fastsam.threads import cpu_threads

CLASSES, BATCH = 10, 8
EARLIER = {"sgd": 1.43e-3, "sam": 5.79e-3}
"""Smallest seconds at commit f386965, before the trainer used PyTorch's engines, measured in the same way."""


@dataclass(frozen=True, kw_only=True)
class HostWork:
    """Measure the time of a step outside the network's passes and the optimizer.

    The network has the modules of a ResNet-50 with few channels: 161 parameters and 159 buffers. Its passes
    read only the pixels and the head, and their time is subtracted, as is that of the optimizer's calls.
    """

    rounds: int = 40
    """Samples of each optimizer."""
    steps: int = 20
    """Steps per sample."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Measure SGD and SAM, print the results, and save them."""
        results: dict[str, Any] = {}
        with cpu_threads(1):
            for name in EARLIER:
                step, clock = _step(name)
                samples = [self._sample(step, clock) for _ in range(self.rounds + 1)][1:]
                smallest = min(
                    samples
                )  # what other processes do adds to the time, and never takes from it
                results[name] = {
                    "median": statistics.median(samples),
                    "smallest": smallest,
                    "samples": len(samples),
                    "at commit f386965": EARLIER[name],
                }
                print(
                    f"{name}: {smallest * 1e3:.2f} ms a step, {smallest / EARLIER[name]:.2f} times that of "
                    "commit f386965"
                )
        if self.save or self.out is not None:
            print(f"wrote {save('host_work', results, device='cpu', folder=self.out)}")

    def _sample(self, step: Callable[[], object], clock: _Clock) -> float:
        clock.seconds = 0.0
        began = time.perf_counter()
        for _ in range(self.steps):
            step()
        return (time.perf_counter() - began - clock.seconds) / self.steps


class _Clock:
    """Adds up the time of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with its time added."""

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds += time.perf_counter() - began
            return result

        return call


class _Pixels(Classifier):
    """Classifies the first pixels of an image, and has layers that it does not use."""

    def outputs(self, inputs: Tensor) -> Outputs:
        features = inputs.flatten(1)[:, :CLASSES]
        return Outputs(features, self.head(features))


def _step(optimizer: str) -> tuple[Callable[[], object], _Clock]:
    """Return a step of the trainer, and the clock of its passes and of its optimizer."""
    layers = ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=4)
    layers.fc = nn.Identity()
    network = _Pixels(layers, nn.Linear(CLASSES, CLASSES), CLASSES)
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sgd = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    made = sgd if optimizer == "sgd" else SAM(optimizer=sgd, rho=0.05)
    clock, engine = _Clock(), Engine(network, World())
    for owner, names in (
        (engine, ("outputs", "backward")),
        (made, ("first_step", "second_step", "step")),
    ):
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, clock.timed(getattr(owner, name)))

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in network.head.parameters():
            parameter.grad = None

    made.zero_grad = zero_grad  # type: ignore[method-assign]
    config = recipe("digits-lt", "ce", "sgd").config()
    objective = build_objective(config, np.full(CLASSES, 100))
    stepper = Stepper(engine, made, objective, seed=0)
    indices = torch.arange(BATCH)
    batch = Batch((torch.randn(BATCH, 3, 4, 4),), indices % CLASSES, indices)
    return lambda: next(stepper.steps([batch], epoch=1)), clock
