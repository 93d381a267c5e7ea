"""The quantities that a run records after each epoch, as figures of training show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastsam.longtail.results import Epoch


@dataclass(frozen=True)
class Quantity:
    """A quantity of an epoch.

    Attributes:
        title: title of a figure of this quantity alone.
        axis: label of its axis under that title.
        label: label of an axis without a title.
        value: returns the quantity of an epoch; None if it was not recorded.
        scale: scale of the axis.
        from_zero: whether 0 belongs on the axis.
    """

    title: str
    axis: str
    label: str
    value: Callable[[Epoch], float | None]
    scale: Literal["linear", "log"] = "linear"
    from_zero: bool = False


QUANTITIES = (
    Quantity("Training loss", "loss", "training loss", lambda epoch: epoch.loss, "log"),
    Quantity(
        "Training accuracy, augmented",
        "accuracy, %",
        "training accuracy, %",
        lambda epoch: epoch.train_accuracy,
    ),
    Quantity(
        "Validation accuracy",
        "accuracy, %",
        "validation accuracy, %",
        lambda epoch: epoch.validation_accuracy,
    ),
    Quantity("Learning rate", "learning rate", "learning rate", lambda epoch: epoch.lr, "log"),
    Quantity("Ascent radius rho", "rho", "rho", lambda epoch: epoch.rho, from_zero=True),
)
