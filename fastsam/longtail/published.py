"""The tables and figures of the paper: the runs that each compares, and its published numbers.

Rangwani et al., "Escaping Saddle Points for Effective Generalization on Class-Imbalanced Data"
(NeurIPS 2022). Numbers that could not be found are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastsam.longtail.errors import UsageError, unknown
from fastsam.longtail.landscape import ALL
from fastsam.longtail.measured import Measured
from fastsam.longtail.settings import value_text


@dataclass(frozen=True)
class Variant:
    """One row of a table, or one run behind a figure.

    Attributes:
        method: method, ``LOSS`` or ``LOSS-RULE``.
        optimizer: name of the optimizer.
        settings: settings that differ from the recipe, by name.
    """

    method: str
    optimizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in folders and tables: ``METHOD-OPTIMIZER``, followed by the settings that differ."""
        extras = (f"{name}-{value_text(value)}" for name, value in self.settings.items())
        return "-".join((self.method, self.optimizer, *extras))


def _both(*methods: str, **settings: Any) -> tuple[Variant, ...]:
    """Return variants of every method with SGD and with SAM."""
    return tuple(
        Variant(method, optimizer, settings) for method in methods for optimizer in ("sgd", "sam")
    )


def _radii(*methods: str) -> tuple[Variant, ...]:
    """Return variants of every method with SAM, at each constant rho of the paper."""
    return tuple(Variant(method, "sam", {"rho": (rho,)}) for method in methods for rho in RADII)


RADII = (0.05, 0.1, 0.2, 0.5, 0.8)
_METHODS = ("ce", "ce-drw", "ldam-drw", "vs")


@dataclass(frozen=True)
class PublishedTable:
    """A table of test accuracies, mean and standard deviation over seeds.

    Attributes:
        title: title of the table.
        rows: rows of the table.
        data: data sets in the paper. The table can be reproduced on any data set.
        note: what is unknown about the published table; empty if nothing is.
    """

    title: str
    rows: tuple[Variant, ...]
    data: tuple[str, ...] = ("cifar10-lt", "cifar100-lt")
    note: str = ""


TABLES: dict[str, PublishedTable] = {
    "table1": PublishedTable(
        "exponential imbalance",
        _both(*_METHODS),
        note="gamma, tau and rho of VS are not published",
    ),
    "table2": PublishedTable(
        "step imbalance",
        _both(*_METHODS, kind="step"),
        note="the published numbers and most rows are not known; the rows of Table 1 are used instead",
    ),
    "table3": PublishedTable(
        "large data sets",
        (Variant("ce", "sgd"), *_both("ce-drw", "ldam-drw")),
        data=("imagenet-lt", "inaturalist18"),
        note="rows that the paper quotes from other papers (cRT, LWS, MiSLAS, DisAlign, DRO-LT) are omitted",
    ),
    "table4": PublishedTable(
        "optimizers that escape saddle points",
        tuple(Variant("ce-drw", name) for name in ("sgd", "pgd", "lpf-sgd", "sam")),
        note="the noise of PGD and LPF-SGD is not published",
    ),
    "table5": PublishedTable(
        "best constant rho of each method",
        _radii(*_METHODS),
        note="published best rho for CE, CE-DRW, LDAM-DRW, chosen on the test set: 0.1, 0.5, 0.8 "
        "(CIFAR-10) and 0.2, 0.8, 0.8 (CIFAR-100)",
    ),
    "imbalance": PublishedTable(
        "imbalance factors 10, 50, 200 (appendix)",
        tuple(row for factor in (10.0, 50.0, 200.0) for row in _both(*_METHODS, imbalance=factor)),
        note="only one published number is known: 89.4 for LDAM-DRW-SAM at factor 10 on CIFAR-10",
    ),
    "ib-paco": PublishedTable(
        "influence-balanced loss and PaCo with SAM (appendix)",
        _both("ib", "paco"),
        note="rho is not published; only one published number is known: 53.0 for PaCo-SAM on CIFAR-100",
    ),
    "figure4": PublishedTable(
        "accuracy as a function of rho, CE-DRW with SAM",
        _radii("ce-drw"),
        data=("cifar10-lt",),
    ),
}
"""Tables by their name in ``fastsam reproduce``, and Figure 4, which shows accuracies like a table."""


def combinations() -> dict[tuple[str, str, str], list[str]]:
    """Return every (data, method, optimizer) in the paper's tables, with the names of its tables."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, table in TABLES.items():
        for data in table.data:
            for row in table.rows:
                names = found.setdefault((data, row.method, row.optimizer), [])
                if name not in names:
                    names.append(name)
    return found


@dataclass(frozen=True)
class SpectraFigure:
    """A figure of Hessian spectra of single classes, at the last epoch or at several epochs.

    Attributes:
        title: title of the figure.
        runs: runs of the figure, with seed 0 each.
        classes: classes whose spectra are shown.
        loss: ``ce`` or ``as-trained``.
        epochs: epochs at which spectra are computed, as fractions of the run; empty for the last epoch only.
        note: what is unknown about the published figure; empty if nothing is.
    """

    title: str
    runs: tuple[Variant, ...]
    classes: tuple[int | Literal["all"], ...]
    loss: str = "ce"
    epochs: tuple[float, ...] = ()
    note: str = ""


FIGURES: dict[str, SpectraFigure] = {
    "figure1": SpectraFigure("a head and a tail class", (Variant("ce-drw", "sgd"),), (0, 7)),
    "figure2": SpectraFigure("all data, a head and a tail class", _both("ce-drw"), (ALL, 0, 8)),
    "figure3": SpectraFigure(
        "|lambda_min / lambda_max| during training",
        _both("ce-drw"),
        (0, 2, 5, 7, 8),
        epochs=(0.05, 0.25, 0.5, 0.8, 0.85, 0.95, 1.0),
    ),
    "figure3c": SpectraFigure(
        "lambda_min of the last class as a function of rho",
        _radii("ce-drw"),
        (9,),
        note="the published numbers are not known; the class was read from a blurred legend",
    ),
    "figure5": SpectraFigure(
        "a head, a mid and a tail class without re-weighting",
        (Variant("ce", "sgd"),),
        (0, 5, 8),
        note="the published classes are not known",
    ),
    "figure6": SpectraFigure("three more classes", _both("ce-drw"), (2, 5, 7)),
    "figure7": SpectraFigure(
        "a head and a tail class under LDAM",
        _both("ldam-drw"),
        (0, 8),
        loss="as-trained",
        note="the published classes are not known; the loss must be the trained one, because plain "
        "cross-entropy of cosine logits cannot reach the published values",
    ),
}
"""Figures of spectra by their name in ``fastsam reproduce``."""


def figure_of(name: str, *, stages: str = "none") -> SpectraFigure:
    """Return a figure of spectra by its name.

    Args:
        name: one of :data:`FIGURES`.
        stages: list of stages of its runs.

    Raises:
        UsageError: if there is no such figure, or it follows one training and the runs have stages.
    """
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    figure = FIGURES[name]
    if figure.epochs and stages != "none":
        others = ", ".join(key for key, other in FIGURES.items() if not other.epochs)
        raise UsageError(
            f"{name} shows spectra along one training, but stages is {stages}; omit stages, or choose a "
            f"figure of final weights: {others}"
        )
    return figure


MEASURES = ("all", "head", "mid", "tail")


def _row(*values: float | tuple[float, float] | None) -> dict[str, Measured]:
    """Return numbers in percent by name, some with the standard deviation that the paper gives.

    Args:
        *values: in the order of :data:`MEASURES`; None for a number that the paper does not give.
    """
    return {
        name: Measured(*value) if isinstance(value, tuple) else Measured(value)
        for name, value in zip(MEASURES, values, strict=True)
        if value is not None
    }


ACCURACIES: dict[tuple[str, str], dict[str, Measured]] = {
    ("cifar10-lt", "ce-sgd"): _row((71.7, 0.1), (90.8, 3.6), (71.9, 0.4), (52.3, 3.7)),
    ("cifar10-lt", "ce-sam"): _row((73.1, 0.3), (93.3, 0.2), (74.1, 0.6), (51.7, 1.0)),
    ("cifar10-lt", "ce-drw-sgd"): _row((75.5, 0.2), (91.6, 0.4), (74.1, 0.4), (61.4, 0.9)),
    ("cifar10-lt", "ce-drw-sam"): _row((80.6, 0.4), (91.4, 0.3), (78.0, 0.4), (73.1, 0.9)),
    ("cifar10-lt", "ce-drw-pgd"): _row(77.2, None, None, 65.0),
    ("cifar10-lt", "ce-drw-lpf-sgd"): _row(78.5, None, None, 67.2),
    ("cifar10-lt", "ldam-drw-sgd"): _row((77.5, 0.5), (91.1, 0.8), (75.7, 0.7), (66.4, 0.2)),
    ("cifar10-lt", "ldam-drw-sam"): _row((81.9, 0.4), (91.0, 0.2), (79.2, 0.5), (76.4, 1.1)),
    ("cifar10-lt", "vs-sgd"): _row((78.6, 0.3), (90.6, 0.4), (75.8, 0.5), (70.3, 0.5)),
    ("cifar10-lt", "vs-sam"): _row((82.4, 0.4), (90.7, 0.0), (79.6, 0.5), (78.0, 1.2)),
    ("cifar100-lt", "ce-sgd"): _row((38.5, 0.5), (64.5, 0.7), (36.8, 1.0), (8.2, 1.0)),
    ("cifar100-lt", "ce-sam"): _row((39.6, 0.6), (66.5, 0.7), (38.1, 1.1), (8.0, 0.6)),
    ("cifar100-lt", "ce-drw-sgd"): _row((41.0, 0.6), (61.3, 1.3), (41.7, 0.5), (14.7, 0.9)),
    ("cifar100-lt", "ce-drw-sam"): _row((44.6, 0.4), (61.2, 0.8), (47.5, 0.6), (20.7, 0.6)),
    ("cifar100-lt", "ce-drw-pgd"): _row(42.2, None, None, 17.0),
    ("cifar100-lt", "ce-drw-lpf-sgd"): _row(42.9, None, None, 15.8),
    ("cifar100-lt", "ldam-drw-sgd"): _row((42.7, 0.3), (61.8, 0.6), (42.2, 1.5), (19.4, 0.9)),
    ("cifar100-lt", "ldam-drw-sam"): _row((45.4, 0.1), (64.4, 0.3), (46.2, 0.2), (20.8, 0.3)),
    ("cifar100-lt", "vs-sgd"): _row((41.7, 0.5), (54.4, 0.2), (41.1, 0.6), (26.8, 1.0)),
    ("cifar100-lt", "vs-sam"): _row((46.6, 0.4), (56.4, 0.4), (48.8, 0.6), (31.7, 0.1)),
    ("imagenet-lt", "ce-sgd"): _row(42.7, 62.5, 36.6, 12.5),
    ("imagenet-lt", "ce-drw-sgd"): _row(44.9, 57.9, 42.2, 21.6),
    ("imagenet-lt", "ce-drw-sam"): _row(47.1, 56.6, 45.8, 28.1),
    ("imagenet-lt", "ldam-drw-sgd"): _row(49.9, 61.1, 48.2, 28.3),
    ("imagenet-lt", "ldam-drw-sam"): _row(53.1, 62.0, 52.1, 34.8),
    ("inaturalist18", "ce-sgd"): _row(60.3, 72.8, 62.7, 54.8),
    ("inaturalist18", "ce-drw-sgd"): _row(63.0, 59.8, 64.4, 62.3),
    ("inaturalist18", "ce-drw-sam"): _row(65.3, 60.5, 66.2, 65.5),
    ("inaturalist18", "ldam-drw-sgd"): _row(67.5, 63.0, 68.3, 67.8),
    ("inaturalist18", "ldam-drw-sam"): _row(70.1, 64.1, 70.5, 71.2),
    ("cifar10-lt", "ldam-drw-sam-imbalance-10"): _row(89.4, None, None, None),
    ("cifar100-lt", "paco-sam"): _row(53.0, None, None, None),
    **{
        ("cifar10-lt", f"ce-drw-sam-rho-{rho:g}"): _row(overall, None, None, tail)
        for rho, overall, tail in zip(
            RADII, (77.0, 78.3, 79.6, 80.6, 77.2), (62.8, 66.1, 70.1, 72.2, 72.9), strict=True
        )
    },
}
"""Published test accuracies by data set and :attr:`Variant.name`. CIFAR has imbalance factor 100 by default.

The paper does not state whether they are of the last or the best epoch. The accuracies for each rho were read
from Figure 4 by eye, to 0.1; the two of the appendix come from a public leaderboard.
"""

EXTREMES: dict[tuple[str, str, int | str], tuple[float, float]] = {
    ("figure1", "ce-drw-sgd", 7): (-59.01, 60.09),
    ("figure2", "ce-drw-sgd", ALL): (-0.98, 13.42),
    ("figure2", "ce-drw-sgd", 0): (-1.72, 23.63),
    ("figure2", "ce-drw-sgd", 8): (-22.95, 23.11),
    ("figure2", "ce-drw-sam", ALL): (-0.59, 12.55),
    ("figure2", "ce-drw-sam", 0): (-1.35, 22.74),
    ("figure2", "ce-drw-sam", 8): (-2.28, 14.58),
    ("figure5", "ce-sgd", 0): (-8.36, 63.0),
    ("figure5", "ce-sgd", 5): (-19.74, 72.76),
    ("figure5", "ce-sgd", 8): (-22.34, 136.98),
    ("figure6", "ce-drw-sgd", 5): (-46.27, 49.87),
    ("figure6", "ce-drw-sgd", 7): (-59.01, 60.09),
    ("figure6", "ce-drw-sam", 2): (-2.14, 27.09),
    ("figure6", "ce-drw-sam", 5): (-3.97, 28.57),
    ("figure6", "ce-drw-sam", 7): (-3.17, 27.12),
    ("figure7", "ldam-drw-sgd", 8): (-196.37, 197.55),
    ("figure7", "ldam-drw-sam", 0): (-1.48, 35.27),
    ("figure7", "ldam-drw-sam", 8): (-17.3, 79.55),
}
"""Smallest and largest Ritz value printed in a figure, by figure, :attr:`Variant.name` and class.

They are for ``cifar10-lt``, with a new augmentation at every product. This drives both values towards
symmetry about 0, so they are not confirmed as curvature. The classes of Figures 5 and 7 are guesses.
"""
