"""What the demo trains: a few ways to train, on two versions of the same data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DATA = "digits-lt"
EPOCHS = 60
HEAD_CLASS, TAIL_CLASS = 0, 9

_LATE_FACTORS = (0.1, 0.001)
"""A tenth of the learning rate after the deferral; the recipe goes to a hundredth and a ten-thousandth. With
SAM's rho below, it was chosen on validation images of Fashion-MNIST (docs/results.md)."""


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: its name in sentences and figures.
        optimizer: its optimizer.
        settings: what differs from the recipe.
        longer: how many times as many epochs as the others.
        branches: whether it continues the first way of its panel after the deferral; the phase before is
            the same, so it is trained once.
    """

    name: str
    optimizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    longer: int = 1
    branches: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.name.lower().replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class PanelPlan:
    """Ways to train that are compared on the same data.

    Attributes:
        title: the data, for a reader.
        folder: name of the folder.
        method: loss and rule.
        settings: settings of the data.
        ways: the first is the one that the others are compared with.
        pairs: further pairs to compare.
        closer: names of the ways whose spectra are measured.
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
        Way("SGD as in the recipe", "sgd"),
        Way("SGD, larger late rate", "sgd", {"lr_factors": _LATE_FACTORS}, branches=True),
        Way("SAM throughout", "sam"),
        Way("SAM late", "sam", {"lr_factors": _LATE_FACTORS, "rho": (0.05,)}, branches=True),
    ),
    pairs=(("SAM late", "SGD, larger late rate"),),
    closer=("SGD, larger late rate", "SAM late"),
)

WRONG_LABELS = PanelPlan(
    title=f"{DATA}, imbalance 50, 40 % wrong labels, ce-drw",
    folder="wrong-labels",
    method="ce-drw",
    settings={"imbalance": 50.0, "label_noise": 0.4, "augment": False},
    ways=(
        Way("SGD", "sgd", {"weight_decay": 0.04}),
        Way("SGD, twice the epochs", "sgd", {"weight_decay": 0.04}, longer=2),
        Way("SAM throughout", "sam", {"weight_decay": 0.005, "rho": (0.6,)}),
    ),
)
"""Six trials of weight decay for SGD and six of rho and weight decay for SAM chose these on validation
images of three other seeds. Their records were not kept; ``digits-noise-40`` in
``python -m benchmarks late-ascent`` repeats them."""

PANELS = (LONG_TAIL, WRONG_LABELS)
