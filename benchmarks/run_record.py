"""Training of a run, and its record: scores as trained, and with tau chosen on validation images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail import Result, Trainer, recipe
from fastsam.longtail.calibrators.logit_adjustment import TAUS
from fastsam.longtail.classes import adjust_logits
from fastsam.longtail.data import Images
from fastsam.longtail.predictions import Predictions
from fastsam.longtail.scores import Scorer
from fastsam.longtail.trained import TrainedRun
from fastsam.longtail.training import Branch

FEW = 20
"""Number of validation images per class in the second choice of tau and settings."""


def trained(
    names: Mapping[str, str],
    values: Mapping[str, Any],
    out: Path,
    *,
    branch: Branch | None = None,
    keep: tuple[int, ...] = (),
) -> Result:
    """Train a run, or continue it.

    Args:
        names: data, method and optimizer.
        values: settings that differ from the recipe's, or from the parent's of a branch.
        out: folder of the run.
        branch: epoch of another run that it starts from; None to train from scratch.
        keep: epochs whose checkpoints are kept.
    """
    if branch is None:
        made = recipe(**names, **values)
        config, sources = made.config(), made.sources
    else:
        config, sources = branch.settings(**names, **values)
    return Trainer(
        config, sources=sources, out=out, resume="auto", branch=branch, keep=keep, progress=False
    ).fit()


def record_of(result: Result, run: TrainedRun, *, tested: bool = True) -> dict[str, Any]:
    """Return the record of a finished run.

    Args:
        result: result of the run.
        run: the run, whose network is scored. Its head may differ from the one that was trained.
        tested: whether to include the scores on the test set. Records for choosing settings have none.
    """
    data = run.data()
    validation = _Scored(run, data.split("validation"))
    few = validation.first(FEW)
    curve, short_curve = ([each.balanced(tau) for tau in TAUS] for each in (validation, few))
    tau, short_tau = (TAUS[int(np.argmax(values))] for values in (curve, short_curve))
    training = _Scored(run, data.train).scores(0.0)
    last = result.history[-1]
    record = {
        "subset": result.subset_hash,
        "gradients": result.total_gradients,
        "seconds": round(result.seconds + sum(x["seconds"] for x in result.earlier_stages), 1),
        "training": {"loss": last.loss, "accuracy": last.train_accuracy},
        "clean training": {name: training[name] for name in ("accuracy", "balanced", "nll")},
        "validation": {"by tau": curve, "by tau, few": short_curve},
    }
    if tested:
        test = _Scored(run, data.test)
        record["test"] = {
            "raw": test.scores(0.0),
            "tau": {"tau": tau, **test.scores(tau)},
            "tau, few": {"tau": short_tau, **test.scores(short_tau)},
        }
    return record


class _Scored:
    """Logits for a set of images, and scores after logit adjustment."""

    def __init__(self, run: TrainedRun, images: Images) -> None:
        self._run = run
        order = np.array_split(np.arange(len(images)), max(1, len(images) // 256))
        with torch.no_grad():
            batches = list(images.batches(order, None, run.device))
            self.logits = torch.cat([run.network(batch.inputs) for batch in batches])
        self.targets = torch.cat([batch.targets for batch in batches])

    def first(self, count: int) -> _Scored:
        """Return a copy with only the first ``count`` images of each class."""
        chosen = torch.cat(
            [(self.targets == c).nonzero()[:count, 0] for c in range(len(self._run.counts))]
        )
        part = copy.copy(self)
        part.logits, part.targets = self.logits[chosen], self.targets[chosen]
        return part

    def scores(self, tau: float) -> dict[str, float]:
        """Return every score with logits adjusted by ``tau``."""
        counts: NDArray[np.int64] = self._run.counts
        adjusted: Tensor = adjust_logits(self.logits, counts, tau)
        scorer = Scorer(Predictions.of(adjusted, self.targets), len(counts), self._run.groups)
        return {name: round(value, 4) for name, value in scorer.scores().items()}

    def balanced(self, tau: float) -> float:
        """Return the balanced accuracy with logits adjusted by ``tau``."""
        return self.scores(tau)["balanced"]


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings as JSON values."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
