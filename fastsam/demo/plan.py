"""The plan of the demo: several training methods on two versions of the same data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DATA = "digits-lt"
EPOCHS = 60
HEAD_CLASS, TAIL_CLASS = 0, 9

_LATE_FACTORS = (0.1, 0.001)
"""Factors on the learning rate after the deferral and after the last milestone (recipe: 0.01 and 0.0001).
These factors and SAM's rho below were chosen on validation images of Fashion-MNIST (docs/results.md)."""


@dataclass(frozen=True)
class Way:
    """One training method.

    Attributes:
        name: name in sentences and figures.
        optimizer: name of the optimizer.
        settings: settings that differ from the recipe.
        longer: factor on the number of epochs.
        branches: whether the run branches off from the first run of its panel after the deferral. The phase
            before is the same, so it is trained once.
    """

    name: str
    optimizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    longer: int = 1
    branches: bool = False

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return self.name.lower().replace(" ", "-").replace("'", "")


@dataclass(frozen=True)
class PanelPlan:
    """Training methods that are compared on the same data.

    Attributes:
        title: description of the data and the method.
        folder: name of the folder.
        method: method of the runs, ``LOSS-RULE``.
        settings: settings of the data set.
        ways: training methods. The first is the baseline of all comparisons.
        pairs: additional pairs to compare.
        closer: names of the training methods whose spectra are measured.
    """

    title: str
    folder: str
    method: str
    settings: Mapping[str, Any]
    ways: tuple[Way, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    closer: tuple[str, ...] = ()


LONG_TAIL = PanelPlan(
    title=f"{DATA}, imbalance 50, ce-drw",
    folder="long-tail",
    method="ce-drw",
    settings={"imbalance": 50.0},
    ways=(
        Way("SGD with the recipe's settings", "sgd"),
        Way(
            "SGD with a larger late learning rate",
            "sgd",
            {"lr_factors": _LATE_FACTORS},
            branches=True,
        ),
        Way("SAM throughout", "sam"),
        Way(
            "SAM in the late phase",
            "sam",
            {"lr_factors": _LATE_FACTORS, "rho": (0.05,)},
            branches=True,
        ),
    ),
    pairs=(("SAM in the late phase", "SGD with a larger late learning rate"),),
    closer=("SGD with a larger late learning rate", "SAM in the late phase"),
)

WRONG_LABELS = PanelPlan(
    title=f"{DATA}, imbalance 50, 40 % wrong labels, ce-drw",
    folder="wrong-labels",
    method="ce-drw",
    settings={"imbalance": 50.0, "label_noise": 0.4, "augment": "none"},
    ways=(
        Way("SGD", "sgd", {"weight_decay": 0.04}),
        Way("SGD for twice the epochs", "sgd", {"weight_decay": 0.04}, longer=2),
        Way("SAM throughout", "sam", {"weight_decay": 0.005, "rho": (0.6,)}),
    ),
)
"""Weight decay and rho were chosen on validation images of three other seeds: among six values of weight
decay for SGD, and six pairs of rho and weight decay for SAM. The records of these trials were not kept; the
setup ``digits-noise-40`` in ``python -m benchmarks late-ascent`` repeats them."""

PANELS = (LONG_TAIL, WRONG_LABELS)
