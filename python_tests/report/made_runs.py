"""Results, spectra and comparisons that were made up, for the tests of the report."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from fastsam.curvature import MatrixOperator, operator_spectrum
from fastsam.longtail import Result, recipe
from fastsam.longtail.landscape import ClassSpectrum, Subject
from fastsam.longtail.metrics import Metrics
from fastsam.longtail.origin import Origin
from fastsam.longtail.results import Epoch
from fastsam.longtail.scores import ConfidenceBin
from fastsam.report import Arm, PairedComparison, PairedPanel

GROUPS = {"head": [0], "mid": [1], "tail": [2, 3]}


def result(optimizer: str, accuracy: float, **settings: Any) -> Result:
    """A run on two classes whose scores all follow from ``accuracy``, as an older version wrote it."""
    chosen = recipe("digits-lt", "ce", optimizer)
    groups = {"head": accuracy, "tail": accuracy / 2}
    metrics = Metrics(
        accuracy, accuracy, groups, groups, [accuracy] * 2, [[0, 0, 1], [1, 1, 1]], 3.25
    )
    return Result(
        config={**chosen.config().as_dict(), **settings},
        sources=chosen.sources,
        counts=[100, 2],
        class_names=["<zero>", "one"],
        groups={"head": [0], "tail": [1]},
        subset_hash="abc",
        rule="last epoch",
        test=metrics,
        validation=None,
        history=[Epoch(1, 0.1, None, 2.0, 50.0, None, 0.1)],
        seconds=1.5,
        unreadable={},
        environment={"torch": "x & y"},
    )


def random_result(generator: random.Random, optimizer: str, **settings: Any) -> Result:
    """A run on four classes with numbers of their own everywhere."""

    def percent() -> float:
        return 100 * generator.random()

    def metrics() -> Metrics:
        by_class = [percent() for _ in range(4)]
        pairs = [(i, j) for i in range(4) for j in range(4)]
        return Metrics(
            accuracy=percent(),
            balanced=percent(),
            groups={name: percent() for name in GROUPS},
            groups_by_count={},
            per_class=by_class,
            confusion=[[i, j, generator.randint(1, 90)] for i, j in pairs],
            ece=percent(),
            nll=3 * generator.random(),
            bins=[ConfidenceBin(percent(), percent(), percent()) for _ in range(3)],
        )

    chosen = recipe("digits-lt", "ce-drw", optimizer, **settings)
    history = [
        Epoch(
            epoch=epoch,
            lr=generator.random(),
            rho=None if optimizer == "sgd" else generator.random(),
            loss=3 * generator.random(),
            train_accuracy=percent(),
            validation_accuracy=percent() if epoch % 2 else None,
            seconds=generator.random(),
            gradients=10.0 + generator.randint(0, 9),
        )
        for epoch in range(1, 6)
    ]
    return Result(
        config=chosen.config().as_dict(),
        sources=chosen.sources,
        counts=[90, 7, 40, 2],
        class_names=["a & b", "c_d", "<script>alert(1)</script>", "e|f"],
        groups=GROUPS,
        subset_hash="0123",
        rule="last epoch",
        test=metrics(),
        validation=metrics(),
        history=history,
        seconds=100 * generator.random(),
        unreadable={},
        environment={"torch": "2"},
        origin=Origin("2026-01-02T03:04:05+00:00", "fastsam train --out 'a b'", "0.1.0", "ab" * 20),
    )


def spectrum(augment: str = "none") -> ClassSpectrum:
    """A spectrum with eigenvalues -2, 0, 1 and 8."""
    matrix = torch.diag(torch.tensor([-2.0, 0.0, 1.0, 8.0], dtype=torch.float64))
    found = operator_spectrum(MatrixOperator(matrix), steps=4, progress=False)
    found = replace(found, loss=0.5, gradient_norm=0.25, weight_norm=7.0)
    return ClassSpectrum(Subject("ce sam", 4, 1, "<one>", "tail", 2, "train", "ce", augment), found)


def named_comparison(name: str) -> PairedComparison:
    """Two arms over two seeds, the first of them called ``name``, on data of that name."""
    scores = {score: [70.0, 72.0] for score in ("accuracy", "balanced", "head", "mid", "tail")}
    arms = [Arm(name, 10.0, scores, scores), Arm("other", 12.0, scores, scores)]
    return PairedComparison(2, [PairedPanel(name, arms, [])])
