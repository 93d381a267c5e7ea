"""Published settings as data: what a data set, a method and an optimizer bring, with the source.

A recipe is merged from the tables below, later entries overriding earlier ones: data set, loss, rule,
optimizer, then exact combinations. ``[paper]`` is Rangwani et al., "Escaping Saddle Points for
Effective Generalization on Class-Imbalanced Data" (NeurIPS 2022), ``[code]`` the code its authors
published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from fastsam.longtail.config import (
    OPTIMIZERS,
    TrainConfig,
    applies,
    check_applies,
    choices_of,
)
from fastsam.longtail.data import DATASETS
from fastsam.longtail.data.catalog import CIFAR, GIVEN, is_given
from fastsam.longtail.errors import unknown
from fastsam.longtail.methods import Method
from fastsam.longtail.models import default_head_init


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


_OURS = "set for runs of some seconds; not tuned (benchmarks/longtail_digits.py compares)"
_CODE = "[code]"

_DIGITS: Layer = {
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
}

_CIFAR: Layer = {
    **_layer("[paper] Table 1", imbalance=100.0, kind="exp", subset_seed=0, model="resnet32"),
    **_layer("default", data_root="data", download=False),
    **_layer(
        _CODE,
        epochs=200,
        batch_size=128,
        lr=0.1,
        weight_decay=2e-4,
        warmup_epochs=5,
        lr_schedule="multistep",
        lr_milestones=(160, 180),
        lr_factors=(0.01, 0.0001),
        defer_epoch=160,
    ),
}


def _borrowed(layer: Layer, source: str) -> dict[str, Entry]:
    """The values of another data set's layer, as starting points."""
    return {name: Entry(entry.value, source, known=False) for name, entry in layer.items()}


_GLYPHS: Layer = {
    **_borrowed(
        {k: v for k, v in _CIFAR.items() if k not in ("data_root", "download")},
        "the recipe of CIFAR-LT",
    ),
    **_layer("definition of glyphs-lt", imbalance=100.0, kind="exp", subset_seed=0),
}

_FILES: Layer = _layer("default", data_root="data", workers=4, corrupt="stop")
_IMAGENET: Layer = {
    **_FILES,
    **_layer(
        _CODE,
        model="resnet50",
        image_size=224,
        epochs=90,
        batch_size=256,
        lr=0.2,
        weight_decay=2e-4,
        warmup_epochs=0,
        lr_schedule="cosine",
        defer_epoch=60,
    ),
}
_INATURALIST: Layer = {**_IMAGENET, **_layer(_CODE, lr=0.1)}
_UNPUBLISHED: Layer = _borrowed(_IMAGENET, "the ImageNet-LT recipe")
_MADE: Layer = _borrowed(
    {
        name: entry
        for name, entry in _CIFAR.items()
        if name not in ("data_root", "download", "imbalance", "kind", "subset_seed")
    },
    "the recipe of CIFAR-LT",
)
"""Starting points for data that are given from Python."""
_OWN: Layer = _layer("default", exif="transpose")

DATA: dict[str, Layer] = {
    "digits-lt": _DIGITS,
    "cifar10-lt": _CIFAR,
    "cifar100-lt": _CIFAR,
    "glyphs10-lt": _GLYPHS,
    "glyphs100-lt": _GLYPHS,
    "imagenet-lt": _IMAGENET,
    "inaturalist18": _INATURALIST,
    "places-lt": _UNPUBLISHED,
    "list": {**_UNPUBLISHED, **_OWN},
    "folder": {**_UNPUBLISHED, **_OWN},
}

LOSS: dict[str, Layer] = {
    "ldam": {
        **_layer("code of Cao et al. 2019", head="cosine", scale=30.0),
        **_layer("Cao et al. 2019 (CIFAR)", max_margin=0.5),
    },
    "vs": _layer(
        _CODE + " defaults; the values behind Table 1 are not published",
        known=False,
        gamma=0.3,
        tau=1.0,
    ),
    "cdt": _layer("the gamma of the VS loss", known=False, gamma=0.3),
    "la": _layer("Menon et al. 2021: tau = 1 is the consistent choice", tau=1.0),
    "focal": _layer("code of Cao et al. 2019", focal_gamma=1.0, focal_mean="samples"),
    "eql": _layer("starting point", known=False, eql_threshold=5e-3, eql_drop=0.9),
    "paco": _layer(
        "code of Cui et al. 2021 (CIFAR-100-LT)",
        paco_alpha=0.01,
        paco_temperature=0.05,
        paco_queue=1024,
        paco_projection=32,
        paco_batch_norm=True,
    ),
    "ib": _layer("code of Park et al. 2021", ib_alpha=1000.0),
}

_WEIGHTS = _layer(_CODE, weighting="effective", beta=0.9999)
_SAMPLES = _layer("Cao et al. 2019 (baselines RS and DRS)", sampling="class-balanced")
RULE: dict[str, Layer] = {"rw": _WEIGHTS, "drw": _WEIGHTS, "rs": _SAMPLES, "drs": _SAMPLES}

_SGD: Layer = _layer(_CODE, momentum=0.9, nesterov=False)
_UNTUNED = "starting point; the paper names no value"
OPTIMIZER: dict[str, Layer] = {
    "sgd": _SGD,
    "sam": {
        **_SGD,
        **_layer(_CODE, rho_schedule="constant"),
        **_layer(_UNTUNED, known=False, rho=(0.05,)),
    },
    "asam": {
        **_SGD,
        **_layer("Kwon et al. 2021 (CIFAR-10)", rho=(0.5,), rho_schedule="constant"),
    },
    "looksam": {
        **_SGD,
        **_layer(_UNTUNED, known=False, rho=(0.05,), rho_schedule="constant"),
        **_layer("Liu et al. 2022", look_every=5, look_alpha=0.7),
    },
    "pgd": {**_SGD, **_layer(_UNTUNED, known=False, noise_sigma=1e-4, noise_on="gradient")},
    "lpf-sgd": {
        **_SGD,
        **_layer(
            "code of Bisla et al. 2022 (CIFAR); the values behind Table 4 are not published",
            known=False,
            lpf_gamma=0.002,
            lpf_parts=1,
        ),
    },
    "entropy-sgd": {
        **_SGD,
        **_layer("Chaudhari et al. 2017, section 4.2", entropy_lr=0.1, entropy_noise=1e-4),
        **_layer("Chaudhari et al. 2017, section 4.2", entropy_alpha=0.75),
        **_layer(_UNTUNED, known=False, entropy_steps=5, entropy_gamma=0.03),
        **_layer("moves all the way to the running mean", known=False, lr=1.0, momentum=0.0),
    },
}

_RUNS = "[code] run.sh"


def _stepped(source: str, *rho: float, known: bool = True) -> dict[str, Entry]:
    """Radii of epochs 1-5, 6-60, 61-75 and 76-90."""
    return _layer(source, known=known, rho=rho, rho_schedule="step", rho_milestones=(5, 60, 75))


_LIKE_DRW = "the radii of ce-drw"
_PACO = "code of Cui et al. 2021"
_PACO_LARGE: Layer = _layer(
    _PACO,
    lr=0.02,
    epochs=400,
    batch_size=128,
    warmup_epochs=10,
    cosine_start="after-warmup",
    paco_alpha=0.05,
    paco_temperature=0.2,
    paco_queue=8192,
    paco_projection=128,
)
_PACO_STEPS: Layer = _layer(
    "in proportion to 90 epochs", known=False, rho_milestones=(23, 267, 334)
)
_PACO_CIFAR100: Layer = _layer(
    _PACO,
    lr=0.05,
    weight_decay=5e-4,
    epochs=400,
    warmup_epochs=10,
    # The code lowers lr where its epoch, counted from 0, is above 320 and 360.
    lr_milestones=(321, 361),
    lr_factors=(0.1, 0.01),
)
_PACO_CIFAR10: Layer = {
    name: Entry(entry.value, "the CIFAR-100-LT recipe", known=False)
    for name, entry in {**LOSS["paco"], **_PACO_CIFAR100}.items()
}
_IB: Layer = _layer(
    "code of Park et al. 2021",
    lr_milestones=(100, 160, 180),
    lr_factors=(0.01, 1e-4, 1e-6),
    defer_epoch=100,
)


def _rho(*values: float) -> dict[str, Entry]:
    return _layer(_RUNS, rho=values)


# (data, method, optimizer) with shell wildcards; later ones win.
EXACT: dict[tuple[str, str, str], Layer] = {
    ("digits-lt", "*", "sam"): _layer(_OURS, rho=(0.05,)),
    ("cifar10-lt", "ce", "sam"): _rho(0.1),
    ("cifar10-lt", "ce-drw", "sam"): _rho(0.5),
    ("cifar10-lt", "ldam-drw", "sam"): _rho(0.8),
    ("cifar100-lt", "ce", "sam"): _rho(0.2),
    ("cifar100-lt", "ce-drw", "sam"): _rho(0.8),
    ("cifar100-lt", "ldam-drw", "sam"): _rho(0.8),
    ("imagenet-lt", "*", "sam"): _stepped(_LIKE_DRW, 0.05, 0.1, 0.5, 0.5, known=False),
    ("inaturalist18", "*", "sam"): _stepped(_LIKE_DRW, 0.05, 0.1, 0.1, 0.2, known=False),
    ("imagenet-lt", "ce-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.5, 0.5),
    ("imagenet-lt", "ldam-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.5, 0.5),
    ("inaturalist18", "ce-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.1, 0.2),
    ("inaturalist18", "ldam-drw", "sam"): _stepped(_RUNS, 0.05, 0.1, 0.5, 0.5),
    ("imagenet-lt", "ldam*", "*"): _layer(_CODE, max_margin=0.3),
    ("inaturalist18", "ldam*", "*"): _layer(_CODE, max_margin=0.3, weight_decay=1e-4),
    ("cifar*-lt", "ib*", "*"): _IB,
    ("cifar10-lt", "paco*", "*"): _PACO_CIFAR10,
    ("cifar100-lt", "paco*", "*"): _PACO_CIFAR100,
    ("imagenet-lt", "paco*", "*"): {**_PACO_LARGE, **_layer(_PACO, weight_decay=5e-4)},
    ("inaturalist18", "paco*", "*"): {**_PACO_LARGE, **_layer(_PACO, weight_decay=1e-4)},
    ("imagenet-lt", "paco*", "sam"): _PACO_STEPS,
    ("inaturalist18", "paco*", "sam"): _PACO_STEPS,
}

# Glyphs take over what CIFAR of as many classes has.
EXACT |= {
    (data.replace("cifar", "glyphs"), method, optimizer): _borrowed(layer, f"the recipe of {data}")
    for (data, method, optimizer), layer in EXACT.items()
    if data in CIFAR
}

_ALWAYS: Layer = _layer(
    "default",
    head="linear",
    cosine_start="first-epoch",
    augment=True,
    seed=0,
    device="cpu",
    threads=0,
    posthoc_tau=0.0,
    select="last",
    precision="float32",
    channels_last=False,
)


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
        values = {name: _of_phases(name, value) for name, value in values.items()}
        given = {name: Entry(value, "given") for name, value in values.items()}
        entries = self.entries | given
        if "epochs" in values:
            entries |= _rescaled(self.entries, values["epochs"], keep=given)
        named = entries.get("head_init")
        if named is None or named.source != "given":
            model = entries["model"].value
            source = "code of Cao et al. 2019 (CIFAR), torch's own elsewhere"
            entries = {**entries, "head_init": Entry(default_head_init(model), source)}
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


def _of_phases(name: str, value: Any) -> Any:
    """``value``, in a tuple of one if it is a number where ``name`` has one for each phase."""
    types = {item.name: str(item.type) for item in fields(TrainConfig)}
    number = isinstance(value, (int, float))
    return (value,) if number and types.get(name, "").startswith("tuple") else value


def default_imbalance(data: str) -> float:
    """The imbalance factor of the recipes of a data set; 1 where the set is as it was found."""
    entry = DATA.get(data, {}).get("imbalance")
    return 1.0 if entry is None else float(entry.value)


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
        data: one of :data:`fastsam.longtail.data.DATASETS`, or ``own:NAME`` for data of your own that
            you pass to :class:`~fastsam.longtail.Trainer`.
        method: ``loss[-rule]``; see :mod:`fastsam.longtail.methods`.
        optimizer: one of :data:`fastsam.longtail.config.OPTIMIZERS`.
        **overrides: settings of :class:`TrainConfig` that replace the published ones; a number
            will do for a setting of phases that has only one.

    Raises:
        UsageError: for an unknown name, or a setting that the combination does not have.

    Example:
        >>> recipe("digits-lt", "ce-drw", "sam", rho=0.1).config().rho
        (0.1,)
    """
    if data not in DATASETS and not is_given(data):
        raise unknown("data", data, (*DATASETS, f"{GIVEN}NAME"))
    if optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    parsed = Method.parse(method)
    entries: dict[str, Entry] = {
        **_ALWAYS,
        **(_MADE if is_given(data) else DATA[data]),
        **LOSS.get(parsed.loss, {}),
        **RULE.get(parsed.rule, {}),
        **OPTIMIZER[optimizer],
    }
    for (data_key, method_key, optimizer_key), layer in EXACT.items():
        keys = ((data, data_key), (method, method_key), (optimizer, optimizer_key))
        if all(fnmatchcase(name, key) for name, key in keys):
            entries.update(layer)
    return Recipe(data, method, optimizer, entries).override(**overrides)
