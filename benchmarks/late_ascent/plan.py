"""The plan: data sets, seeds, trials and arms, fixed before the first run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

METHODS = ("ce-drw", "ldam-drw")
TUNING_SEEDS = (100, 101)
"""Seeds for choosing settings; they are not reported."""
CLASSES = 10

Values = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """A data set of a given size, with the settings that all arms share.

    Attributes:
        name: name in files and tables.
        data: name of the data set.
        settings: settings of the data set, and of the run if no arm changes them.
        epochs: epochs of a run.
        defer: epochs before the late phase, which starts with the deferred rule and the first drop of the
            learning rate.
        seeds: number of reported seeds; they are 0, 1, ...
        methods: methods, ``LOSS-RULE``.
        ordered: whether every seed has its own order of classes.
        deferred: whether the methods have a deferred rule.
        second_run: whether the controls that branch off, and the curvature, come from a second run of every
            seed, because the networks of the first were not kept.
        gpu: whether it requires a GPU; it is then trained only if it is selected explicitly.
    """

    name: str
    data: str
    settings: tuple[tuple[str, Any], ...]
    epochs: int
    defer: int
    seeds: int
    methods: tuple[str, ...] = METHODS
    ordered: bool = True
    deferred: bool = True
    second_run: bool = False
    gpu: bool = False

    @property
    def has_wrong_labels(self) -> bool:
        """Whether the training labels are noisy."""
        return "label_noise" in dict(self.settings)

    def of_seed(self, seed: int) -> Values:
        """Return the settings of a seed: it determines subset, class order, initial weights and batches."""
        values = {**dict(self.settings), "seed": seed, "subset_seed": seed}
        if self.ordered:
            values["class_order"] = ",".join(map(str, class_order(seed)))
        return values

    def schedule(self, factor: float, *, late: int = 1, longer: int = 1) -> Values:
        """Return the settings of a schedule whose late phase starts at ``factor`` times the learning rate.

        In the middle of the late phase the learning rate drops by another factor of 0.01, as in the recipe of
        CIFAR-10-LT.

        Args:
            factor: factor on the learning rate in the first half of the late phase.
            late: factor on the length of the late phase.
            longer: factor on the length of the whole run.
        """
        defer = longer * self.defer
        length = longer * late * (self.epochs - self.defer)
        return {
            "epochs": defer + length,
            **({"defer_epoch": defer} if self.deferred else {}),
            "lr_milestones": (defer, defer + length // 2),
            "lr_factors": (factor, factor / 100),
        }


_RUN = (("threads", 1), ("channels_last", True), ("validate_every", 1000))
"""One thread per run, because several runs are trained concurrently. Validation is evaluated only at the
end."""
_FASHION = (*_RUN, ("validation_per_class", 100))
_FASHION_600 = (*_FASHION, ("n_max", 600))
_BFLOAT16 = ("precision", "bfloat16")
"""Precision of the sets that were added to the plan later. They are trained on a processor with instructions
for bfloat16, where a step takes 0.6 times as long as in float32."""

SETUPS = {
    setup.name: setup
    for setup in (
        Setup(
            "fashion-600",
            "fashion-mnist-lt",
            _FASHION_600,
            epochs=60,
            defer=48,
            seeds=10,
            second_run=True,
        ),
        Setup(
            "fashion-5000",
            "fashion-mnist-lt",
            (*_FASHION, ("n_max", 5000)),
            epochs=30,
            defer=24,
            seeds=5,
            second_run=True,
        ),
        Setup(
            "digits",
            "digits-lt",
            (*_RUN, ("imbalance", 50.0)),
            epochs=60,
            defer=48,
            seeds=10,
            ordered=False,
        ),
        Setup(
            "wide",
            "fashion-mnist-lt",
            (*_FASHION_600, _BFLOAT16, ("model", "resnet8-w32")),
            epochs=60,
            defer=48,
            seeds=5,
            methods=("ce-drw",),
        ),
        *(
            Setup(
                f"noise-{percent}",
                "fashion-mnist-lt",
                (*_FASHION_600, _BFLOAT16, ("label_noise", percent / 100)),
                epochs=60,
                defer=48,
                seeds=5,
                methods=("ce-drw",),
            )
            for percent in (20, 40)
        ),
        Setup(
            "balanced-noise-40",
            "fashion-mnist-lt",
            (
                *_FASHION,
                _BFLOAT16,
                ("n_max", 100),
                ("imbalance", 1.0),
                ("label_noise", 0.4),
                ("augment", "none"),
            ),
            epochs=60,
            defer=48,
            seeds=10,
            methods=("ce",),
            deferred=False,
        ),
        Setup(
            "digits-noise-40",
            "digits-lt",
            (*_RUN, ("imbalance", 50.0), ("label_noise", 0.4), ("augment", "none")),
            epochs=60,
            defer=48,
            seeds=10,
            methods=("ce-drw",),
            ordered=False,
        ),
        Setup(
            "cifar10-4900",
            "cifar10-lt",
            (
                ("device", "cuda"),
                ("data_root", "data"),
                ("validate_every", 1000),
                ("validation_per_class", 100),
                ("n_max", 4900),
            ),
            epochs=200,
            defer=160,
            seeds=5,
            gpu=True,
        ),
    )
}
TUNED_ON = "fashion-600"
"""Late settings are chosen on this setup and transferred to the others."""

RECIPE: Values = {"lr": 0.1, "weight_decay": 2e-4}
BASES: tuple[Values, ...] = tuple(
    {"lr": lr, "weight_decay": decay}
    for lr, decay in itertools.product((0.05, 0.1), (2e-4, 1e-3, 5e-3))
)
"""Trials of SGD for the first phase, with the recipe's late learning rate."""
RECIPE_FACTOR = 0.01
SGD_FACTORS = (0.01, 0.03, 0.1, 0.3)
DECAY_FACTORS = (1, 10)
SAM_FACTORS = (0.01, 0.1)
RADII = (0.05, 0.1, 0.3, 0.6)
"""Values of rho for SAM throughout, and for late SAM."""


@dataclass(frozen=True)
class Arm:
    """One configuration that is trained.

    Attributes:
        name: name in files and tables.
        optimizer: ``sgd`` or ``sam``.
        factor: factor on the learning rate in the late phase.
        decay: factor on the weight decay.
        settings: additional settings.
        branched: whether it branches off from the base after the deferral; otherwise it trains from scratch.
        late: factor on the length of the late phase.
        longer: factor on the length of the whole run.
        seed: offset of the seed, which changes order and augmentation of the batches of a branch.
    """

    name: str
    optimizer: str = "sgd"
    factor: float = RECIPE_FACTOR
    decay: float = 1
    settings: tuple[tuple[str, Any], ...] = ()
    branched: bool = True
    late: int = 1
    longer: int = 1
    seed: int = 0

    @property
    def origin(self) -> str | None:
        """Name of the arm that it branches off from."""
        return "base" if self.branched else None


def throughout(optimizer: str, decay: float, rho: float | None = None, *, longer: int = 1) -> Arm:
    """Return an arm that trains from scratch at the recipe's learning rate.

    Args:
        optimizer: ``sgd`` or ``sam``.
        decay: weight decay.
        rho: rho of SAM; None for SGD.
        longer: factor on the number of epochs.
    """
    settings: Values = {**RECIPE, "weight_decay": decay}
    name = f"{optimizer} wd {decay:g}"
    if rho is not None:
        settings["rho"], name = (rho,), f"{name} rho {rho:g}"
    if longer > 1:
        name = f"{name}, {longer} times the epochs"
    return Arm(name, optimizer, settings=tuple(settings.items()), branched=False, longer=longer)


def late_sgd(factor: float, decay: float) -> Arm:
    """Return a trial of SGD in the late phase."""
    return Arm(f"sgd late lr {factor:g} wd {decay:g}", factor=factor, decay=decay)


def late_sam(factor: float, rho: float) -> Arm:
    """Return a trial of SAM in the late phase."""
    return Arm(f"sam late lr {factor:g} rho {rho:g}", "sam", factor, settings=(("rho", (rho,)),))


SGD_TRIALS = tuple(late_sgd(*pair) for pair in itertools.product(SGD_FACTORS, DECAY_FACTORS))
SAM_TRIALS = tuple(late_sam(*pair) for pair in itertools.product(SAM_FACTORS, RADII))
OWN_TRIALS: dict[str, dict[str, tuple[Arm, ...]]] = {
    "balanced-noise-40": {
        "sgd": tuple(throughout("sgd", decay) for decay in (5e-3, 1e-2, 2e-2, 4e-2)),
        "sam": tuple(
            throughout("sam", *pair) for pair in itertools.product((5e-3, 2e-2), (0.2, 0.5))
        ),
    },
    "digits-noise-40": {
        "sgd": tuple(throughout("sgd", decay) for decay in (5e-4, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)),
        "sam": tuple(
            throughout("sam", *pair) for pair in itertools.product((5e-4, 5e-3), (0.1, 0.3, 0.6))
        ),
    },
}
"""Trials of setups whose settings are not transferred from fashion-600. These arms train from scratch."""


def more_trials(sgd: Arm, sam: Arm) -> dict[str, tuple[Arm, Arm]]:
    """Return two more trials of each family if a winner is at the end of its grid, else none.

    Args:
        sgd: winner of SGD, whose learning-rate factor is checked.
        sam: winner of SAM, whose rho is checked.
    """
    rho = dict(sam.settings)["rho"][0]
    if sgd.factor not in (SGD_FACTORS[0], SGD_FACTORS[-1]) and rho not in (RADII[0], RADII[-1]):
        return {}
    factor = 0.003 if sgd.factor <= 0.03 else 1.0
    radius = 0.02 if rho <= 0.1 else 1.2
    return {
        "sgd": (late_sgd(factor, DECAY_FACTORS[0]), late_sgd(factor, DECAY_FACTORS[1])),
        "sam": (late_sam(SAM_FACTORS[0], radius), late_sam(SAM_FACTORS[1], radius)),
    }


def class_order(seed: int) -> list[int]:
    """Return the classes from the largest to the smallest: row ``seed`` of a Latin square.

    In ten consecutive rows every class has every rank once.
    """
    generator = np.random.RandomState(2026)
    rows, ranks, names = (generator.permutation(CLASSES) for _ in range(3))
    return [int(names[(rows[seed % CLASSES] + rank) % CLASSES]) for rank in ranks]
