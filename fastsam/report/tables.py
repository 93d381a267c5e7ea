"""The numbers of runs as rows of text, for the terminal and the page alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsam.longtail.config import differences, settings_in
from fastsam.longtail.landscape import REDRAWN, ClassSpectrum
from fastsam.longtail.results import Result
from fastsam.longtail.trained import Evaluation


@dataclass(frozen=True)
class TextTable:
    """Rows of text under a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        """Columns aligned with spaces; the first to the left, the others to the right."""
        lines = (self.header, *self.rows)
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def run_name(result: Result) -> str:
    """How a run is called in tables and figures: ``method optimizer``."""
    return f"{result.config['method']} {result.config['optimizer']}"


_SEEDS = ("seed", "subset_seed")


def by_settings(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs that differ in nothing but their seeds and place, together under a name of their own.

    The name is ``method optimizer``, with the settings in which runs of that name differ and, where
    there are several, the number of seeds.
    """
    groups: list[list[Result]] = []
    for result in results:
        members = next((group for group in groups if not _differing(group[0], result)), None)
        if members is None:
            groups.append([result])
        # The same run twice is not two seeds: it would narrow the deviation.
        elif not any(_seeds(member) == _seeds(result) for member in members):
            members.append(result)
    named = {}
    for members in groups:
        first = members[0]
        rivals = [other[0] for other in groups if run_name(other[0]) == run_name(first)]
        differing = {name for rival in rivals for name in _differing(first, rival)}
        settings = [
            f"{name} {_setting(value)}" for name, value in first.config.items() if name in differing
        ]
        count = [f"{len(members)} seeds"] if len(members) > 1 else []
        named[", ".join([run_name(first), *settings, *count])] = members
    return named


def _differing(one: Result, other: Result) -> list[str]:
    """The settings, but for the seeds, that make two runs different ones."""
    return [name for name in differences(one.config, other.config) if name not in _SEEDS]


def _seeds(result: Result) -> list[Any]:
    return [result.config.get(name) for name in _SEEDS]


def mean_and_deviation(values: Sequence[float]) -> str:
    """``80.1``, or ``80.1 +- 0.4`` for several values."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values):.1f}"


def accuracy_table(results: Sequence[Result]) -> TextTable:
    """Test accuracy in percent, overall and by group, calibration error, and cost of each run.

    Runs that differ in their seeds alone share a row: mean and standard deviation over them.
    """
    groups = list(results[0].test.groups) if results else []
    rows = tuple(
        (
            name,
            mean_and_deviation([result.test.accuracy for result in members]),
            *(
                mean_and_deviation([r.test.groups.get(group, float("nan")) for r in members])
                for group in groups
            ),
            mean_and_deviation([result.test.ece for result in members]),
            _cost(members),
            mean_and_deviation([result.seconds for result in members]),
        )
        for name, members in by_settings(results).items()
    )
    return TextTable(("test accuracy, %", "all", *groups, "ECE", "gradients", "seconds"), rows)


def _cost(results: Sequence[Result]) -> str:
    """Forward and backward passes over whole batches; empty where older runs did not count them."""
    costs = [result.gradients for result in results if result.gradients is not None]
    return f"{statistics.mean(costs):.0f}" if len(costs) == len(results) else ""


_LONG_NAMES = {
    "harmonic_mean": "harmonic mean of classes",
    "worst_class": "worst class",
    "top5": "top-5",
    "macro_f1": "macro F1",
    "nll": "NLL, nats",
    "ece": "calibration error",
}
_CONFUSIONS = 5
"""Pairs of classes that are shown, those that are confused most often."""


def score_table(evaluation: Evaluation) -> TextTable:
    """Every score of an evaluation with its interval."""
    rows = []
    for name, value in evaluation.scores.items():
        digits = 3 if name == "nll" else 1
        low, high = evaluation.intervals.get(name, (float("nan"),) * 2)
        interval = f"[{low:.{digits}f}, {high:.{digits}f}]" if evaluation.intervals else ""
        rows.append((_LONG_NAMES.get(name, name), f"{value:.{digits}f}", interval))
    title = f"{evaluation.data}, {evaluation.split}, prior {evaluation.prior}"
    return TextTable(
        (f"{title}; %", "score", f"{100 * evaluation.level:g} % interval"), tuple(rows)
    )


def class_table(evaluation: Evaluation) -> TextTable:
    """Accuracy of each class, with its group, training images and evaluated images."""
    group_of = {label: name for name, members in evaluation.groups.items() for label in members}
    images = evaluation.metrics.confusion_matrix().sum(axis=1)
    rows = tuple(
        (
            name,
            group_of.get(label, ""),
            str(count),
            str(images[label]),
            f"{share:.1f}" if images[label] else "-",
        )
        for label, (name, count, share) in enumerate(
            zip(
                evaluation.class_names, evaluation.counts, evaluation.metrics.per_class, strict=True
            )
        )
    )
    return TextTable(("class", "group", "training images", "images", "accuracy, %"), rows)


def _share(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1f}"


def confusion_table(evaluation: Evaluation) -> TextTable:
    """The pairs of classes that are confused most often."""
    wrong = [entry for entry in evaluation.metrics.confusion if entry[0] != entry[1]]
    wrong.sort(key=lambda entry: -entry[2])
    names = evaluation.class_names
    rows = tuple((f"{names[i]} as {names[j]}", str(n)) for i, j, n in wrong[:_CONFUSIONS])
    return TextTable(("most frequent confusions", "images"), rows)


def spectrum_table(spectra: Sequence[ClassSpectrum]) -> TextTable:
    """Both extremes with their Ritz residual bounds, and what is needed to judge them."""
    rows = []
    several = len({item.subject.epoch for item in spectra}) > 1
    for item in spectra:
        spectrum, subject = item.spectrum, item.subject
        low, high = item.ratio_bounds
        rows.append(
            (
                f"{subject.run}, {f'epoch {subject.epoch}, ' if several else ''}{subject.whose} "
                f"({subject.of})" + (" RE-DRAWN" if subject.augment == REDRAWN else ""),
                _with_error(spectrum.lambda_max, spectrum.lambda_max_residual),
                _with_error(spectrum.lambda_min, spectrum.lambda_min_residual),
                f"{spectrum.ratio:.4f} [{low:.4f}, {high:.4f}]",
                _number(spectrum.loss),
                _number(spectrum.gradient_norm),
                _number(spectrum.weight_norm),
            )
        )
    header = (
        "spectrum of",
        "lambda_max",
        "lambda_min",
        "|min/max|",
        "class loss",
        "|gradient|",
        "|weights|",
    )
    return TextTable(header, tuple(rows))


def settings_table(results: Sequence[Result]) -> TextTable:
    """Every setting of every run and where it comes from; settings that no run has are left out."""
    names = dict.fromkeys(name for result in results for name in settings_in(result.config))
    rows = []
    for name in names:
        sources = {result.sources[name]: None for result in results if name in result.sources}
        values = (_setting(result.config.get(name)) for result in results)
        rows.append((name, *values, "; ".join(sources)))
    return TextTable(("setting", *(run_name(result) for result in results), "source"), tuple(rows))


def _setting(value: object) -> str:
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return "" if value is None else str(value)


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g} +- {error:.1g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
