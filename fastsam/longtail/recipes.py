"""Published settings as data: what a data set, a method and an optimizer bring, with the source.

A recipe is laid together from the tables below, the later one winning: data set, loss, rule,
optimizer, then exact combinations. ``[paper]`` is Rangwani et al., "Escaping Saddle Points for
Effective Generalization on Class-Imbalanced Data" (NeurIPS 2022), ``[code]`` the code its authors
published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsam.longtail.config import (
    OPTIMIZERS,
    SAM_FAMILY,
    TrainConfig,
    applies,
    check_applies,
    choices_of,
)
from fastsam.longtail.data import DATASETS
from fastsam.longtail.errors import unknown
from fastsam.longtail.methods import Method


@dataclass(frozen=True)
class Entry:
    """One value of a recipe.

    Attributes:
        value: what the setting is.
        source: where it comes from.
        known: False where no source states the value and it is only a starting point.
    """

    value: Any
    source: str
    known: bool = True


Layer = Mapping[str, Entry]


def _layer(source: str, *, known: bool = True, **values: Any) -> dict[str, Entry]:
    return {name: Entry(value, source, known) for name, value in values.items()}


_OURS = "chosen on the validation split of digits-lt"
_CODE = "[code]"

DATA: dict[str, Layer] = {
    "digits-lt": {
        **_layer("definition of digits-lt", imbalance=50.0, kind="exp", subset_seed=0),
        **_layer(
            _OURS,
            model="resnet8",
            epochs=100,
            batch_size=32,
            lr=0.1,
            weight_decay=5e-4,
            warmup_epochs=5,
            lr_schedule="multistep",
            lr_milestones=(80, 90),
            lr_factors=(0.01, 0.0001),
            defer_epoch=80,
        ),
        **_layer("two threads are slower than one on 8x8 images", threads=1),
    },
}

LOSS: dict[str, Layer] = {
    "ldam": {
        **_layer("Cao et al. 2019, section 3.2", head="cosine", scale=30.0),
        **_layer("Cao et al. 2019, section 4 (CIFAR)", max_margin=0.5),
    },
    "vs": {
        **_layer(
            _CODE + " defaults; the values behind Table 1 are not published",
            known=False,
            gamma=0.3,
            tau=1.0,
        ),
    },
    "cdt": _layer("the gamma of the VS loss", known=False, gamma=0.3),
    "la": _layer("Menon et al. 2021, section 5", tau=1.0),
    "focal": _layer("code of Cao et al. 2019", focal_gamma=1.0),
    "eql": _layer("starting point", known=False, eql_threshold=5e-3, eql_drop=0.9),
    "ib": _layer("code of Park et al. 2021", ib_alpha=1000.0),
}

_WEIGHTS = _layer(_CODE, weighting="effective", beta=0.9999)
_SAMPLES = _layer("Cao et al. 2019, section 4 (baselines RS and DRS)", sampling="class-balanced")
RULE: dict[str, Layer] = {"rw": _WEIGHTS, "drw": _WEIGHTS, "rs": _SAMPLES, "drs": _SAMPLES}

OPTIMIZER: dict[str, Layer] = {
    name: _layer("[paper] section 5", momentum=0.9, nesterov=False) for name in OPTIMIZERS
}
for _name in SAM_FAMILY:
    OPTIMIZER[_name] = {**OPTIMIZER[_name], **_layer("[paper] section 4", rho_schedule="constant")}

# (data, method, optimizer); "*" stands for any.
EXACT: dict[tuple[str, str, str], Layer] = {
    ("digits-lt", "*", "sam"): _layer(_OURS, rho=(0.05,)),
    ("digits-lt", "*", "asam"): _layer("starting point", known=False, rho=(0.5,)),
}

_ALWAYS: Layer = _layer("default", head="linear", augment=True, seed=0, device="cpu", threads=0)


@dataclass(frozen=True)
class Recipe:
    """The settings of one (data, method, optimizer) and where each comes from.

    Attributes:
        data: name of the data set.
        method: ``loss[-rule]``.
        optimizer: name of the optimizer.
        entries: every setting that applies.
    """

    data: str
    method: str
    optimizer: str
    entries: dict[str, Entry]

    def override(self, **values: Any) -> Recipe:
        """The same recipe with some settings given by the user.

        Another number of ``epochs`` moves every epoch of the schedules that is not given as well,
        in proportion and rounded up.

        Raises:
            UsageError: for a setting that does not exist, or that this data, method or optimizer
                does not have.
        """
        given = {name: Entry(value, "given") for name, value in values.items()}
        entries = self.entries | given
        if "epochs" in values:
            entries |= _rescaled(self.entries, values["epochs"], keep=given)
        choices = choices_of(self._values | values | self._names)
        for name in given:
            check_applies(name, choices)
        kept = {name: entry for name, entry in entries.items() if applies(name, choices)}
        return Recipe(self.data, self.method, self.optimizer, kept)

    def config(self) -> TrainConfig:
        """The final settings.

        Raises:
            UsageError: where a value is out of range or none is known.
        """
        return TrainConfig.from_dict(self._names | self._values)

    @property
    def sources(self) -> dict[str, str]:
        """Where each setting comes from; a value that no source states is marked as such."""
        return {
            name: entry.source + ("" if entry.known else " (not a published value)")
            for name, entry in self.entries.items()
        }

    @property
    def _names(self) -> dict[str, Any]:
        return {"data": self.data, "method": self.method, "optimizer": self.optimizer}

    @property
    def _values(self) -> dict[str, Any]:
        return {name: entry.value for name, entry in self.entries.items()}


def _rescaled(entries: Layer, epochs: int, *, keep: Layer) -> dict[str, Entry]:
    """The schedules of ``entries``, all but ``keep``, stretched to another number of epochs."""
    published: int = entries["epochs"].value
    source = f"in proportion to {published} epochs"

    def scaled(epoch: int) -> int:
        return math.ceil(epoch * epochs / published)

    stretched = {}
    for name in ("warmup_epochs", "lr_milestones", "rho_milestones", "defer_epoch"):
        if name in entries and name not in keep and epochs != published:
            value: Any = entries[name].value
            if isinstance(value, tuple):
                value = tuple(scaled(epoch) for epoch in value)
            elif name == "defer_epoch":
                value = min(scaled(value), epochs - 1)
            else:
                value = scaled(value)
            stretched[name] = Entry(value, source, entries[name].known)
    return stretched


def recipe(data: str, method: str, optimizer: str, **overrides: Any) -> Recipe:
    """The published settings of a combination.

    Args:
        data: one of :data:`fastsam.longtail.data.DATASETS`.
        method: ``loss[-rule]``; see :mod:`fastsam.longtail.methods`.
        optimizer: one of :data:`fastsam.longtail.config.OPTIMIZERS`.
        **overrides: settings of :class:`TrainConfig` that replace the published ones.

    Raises:
        UsageError: for an unknown name, or a setting that the combination does not have.

    Example:
        >>> recipe("digits-lt", "ce-drw", "sam", rho=(0.1,)).config().rho
        (0.1,)
    """
    if data not in DATASETS:
        raise unknown("data", data, DATASETS)
    if optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    parsed = Method.parse(method)
    entries: dict[str, Entry] = {
        **_ALWAYS,
        **DATA[data],
        **LOSS.get(parsed.loss, {}),
        **RULE.get(parsed.rule, {}),
        **OPTIMIZER[optimizer],
    }
    for (data_key, method_key, optimizer_key), layer in EXACT.items():
        if (
            data_key in ("*", data)
            and method_key in ("*", method)
            and optimizer_key in ("*", optimizer)
        ):
            entries.update(layer)
    return Recipe(data, method, optimizer, entries).override(**overrides)
