"""Curvature tracking during training: its overhead, and its error against converged eigenvalues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import save
from fastsam import SAM, curvature_operator
from fastsam.curvature import CurvatureTracker, eigenpairs
from fastsam.longtail.models import build_model
from fastsam.threads import cpu_threads

CONVERGED = 1e-5
"""Residual of a converged eigenvalue, relative to the norm."""

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Case:
    """A tracked run: what is tracked, and how often.

    Attributes:
        name: name in the table.
        every: steps from one measurement to the next.
        budget: largest share of the training time; None to measure at every due step.
        samples: number of tracked samples of each group.
        groups: classes of each tracked group.
    """

    name: str
    every: int
    budget: float | None
    samples: int
    groups: dict[str, list[int]]


CASES = (
    _Case("5 % of the time", 20, 0.05, 32, {"all": list(range(10))}),
    _Case("every 100 steps", 100, None, 64, {"head": [0, 1, 2], "tail": [7, 8, 9]}),
)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Track the extreme eigenvalues of a ResNet-8 that SAM trains on digits."""

    steps: int = 600
    """Training steps."""
    batch_size: int = 128
    """Images per step."""
    device: str = "cpu"
    """Device."""
    save: bool = False
    """Write the results to benchmarks/results/."""
    out: Path | None = None
    """Write the results to this folder instead."""

    def run(self) -> None:
        """Train with a tracker, and compare every measurement with a converged run."""
        rows = []
        with cpu_threads(1):
            for case in CASES:
                rows.append({"case": case.name, **self._track(case)})
                print(rows[-1], flush=True)
            if self.save or self.out is not None:
                settings = {"steps": self.steps, "batch_size": self.batch_size, "tol": CONVERGED}
                content = {"settings": settings, "rows": rows}
                print(save("tracking", content, device=self.device, folder=self.out))

    def _track(self, case: _Case) -> dict[str, Any]:
        torch.manual_seed(0)
        images = digits(self.device)
        model = build_model("resnet8", 10, channels=1).to(self.device)
        criterion = nn.CrossEntropyLoss()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.05, momentum=0.9)
        chosen = {
            name: first(images, classes, case.samples) for name, classes in case.groups.items()
        }
        trackers = {
            name: CurvatureTracker(
                model,
                criterion,
                tracked,
                every=case.every,
                budget=None if case.budget is None else case.budget / len(chosen),
            )
            for name, tracked in chosen.items()
        }
        weights: dict[tuple[str, int], dict[str, Tensor]] = {}
        for step, (inputs, targets) in enumerate(batches(images, self.batch_size, self.steps)):
            for name, tracker in trackers.items():
                if tracker.step(step, lr=0.05):
                    state = model.state_dict()
                    weights[name, step] = {key: value.clone() for key, value in state.items()}
            model.train()
            criterion(model(inputs), targets).backward()
            optimizer.first_step(zero_grad=True)
            criterion(model(inputs), targets).backward()
            optimizer.second_step(zero_grad=True)
        points: list[dict[str, Any]] = []
        for (name, step), state in weights.items():
            model.load_state_dict(state)
            operator = curvature_operator(model, criterion, chosen[name])
            largest, smallest = (
                eigenpairs(operator, which=which, tol=CONVERGED, progress=False)
                for which in ("largest", "smallest")
            )
            point = next(each for each in trackers[name].points if each.step == step)
            exact = float(largest.values[0]), float(smallest.values[0])
            points.append(
                {
                    "group": name,
                    "step": step,
                    "lambda_max": point.lambda_max,
                    "lambda_min": point.lambda_min,
                    "products": point.products,
                    "converged lambda_max": exact[0],
                    "converged lambda_min": exact[1],
                    "converged products": largest.products + smallest.products,
                }
            )
        return {
            "every": case.every,
            "budget": case.budget,
            "samples": case.samples,
            "groups": case.groups,
            "overhead": sum(tracker.overhead for tracker in trackers.values()),
            "products": sum(point["products"] for point in points),
            "converged products": sum(point["converged products"] for point in points),
            "largest error": {
                name: max(abs(p[name] / p[f"converged {name}"] - 1) for p in points)
                for name in ("lambda_max", "lambda_min")
            },
            "points": points,
        }


def digits(device: str) -> Images:
    """Return scikit-learn's digits as images ``[N, 1, 8, 8]`` and labels, on ``device``."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float()[:, None] / 16
    return images.to(device), torch.from_numpy(loaded.target).to(device)


def first(images: Images, classes: list[int], count: int) -> Images:
    """Return the first ``count`` images of some classes."""
    wanted = torch.tensor(classes, device=images[1].device)
    rows = torch.isin(images[1], wanted).nonzero()[:count, 0]
    return images[0][rows], images[1][rows]


def batches(images: Images, size: int, count: int) -> Iterator[Images]:
    """Iterate over random batches, epoch by epoch."""

    def endless() -> Iterator[Images]:
        while True:
            order = torch.randperm(len(images[1])).to(images[1].device)
            for rows in torch.split(order, size)[:-1]:
                yield images[0][rows], images[1][rows]

    return itertools.islice(endless(), count)
