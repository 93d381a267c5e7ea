"""The numbers of runs as rows of text, for the terminal and the page alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastsam.longtail.config import settings_in
from fastsam.longtail.landscape import REDRAWN, ClassSpectrum
from fastsam.longtail.measured import Measured
from fastsam.longtail.results import Result
from fastsam.longtail.trained import Evaluation
from fastsam.report.collect import Run
from fastsam.report.groups import SEEDS, Group, setting_text
from fastsam.report.text_table import TextTable, range_text


def accuracy_table(groups: Sequence[Group]) -> TextTable:
    """Test accuracy in percent, overall, balanced and by group of classes, calibration error, and cost.

    Mean and standard deviation over runs that differ in their seeds alone; a cell is empty if one of the
    runs has no such number.
    """
    names = accuracy_names(groups)
    rows = tuple(
        (
            group.name,
            *(
                str(Measured.of(r.test.group_accuracy(name) for r in group.results))
                for name in names
            ),
            str(Measured.of(r.test.ece for r in group.results)),
            Measured.of(r.total_gradients for r in group.results).mean_text(0),
            str(Measured.of(r.seconds for r in group.results)),
        )
        for group in groups
    )
    return TextTable(("test accuracy, %", *names, "ECE", "gradients", "seconds"), rows)


def accuracy_names(groups: Sequence[Group]) -> list[str]:
    """Return ``all``, ``balanced`` and the names of the groups of classes of all runs."""
    return [
        "all",
        "balanced",
        *dict.fromkeys(name for group in groups for name in group.first.test.groups),
    ]


def class_accuracy_table(groups: Sequence[Group]) -> TextTable:
    """Test accuracy of each class, largest class first, with a column for each group of runs."""
    first = groups[0].first
    group_of = {label: name for name, members in first.groups.items() for label in members}
    rows = tuple(
        (
            first.class_names[label],
            group_of.get(label, ""),
            range_text(result.counts[label] for group in groups for result in group.results),
            *(str(Measured.of(r.test.per_class[label] for r in group.results)) for group in groups),
        )
        for label in by_count(first)
    )
    return TextTable(("class", "group", "training images", *(group.name for group in groups)), rows)


def by_count(result: Result) -> list[int]:
    """Return the classes of a run, largest first."""
    return sorted(range(len(result.counts)), key=lambda label: -result.counts[label])


def calibration_table(groups: Sequence[Group]) -> TextTable:
    """Calibration error, mean confidence and negative log likelihood on the test set."""
    rows = tuple(
        (
            group.name,
            str(Measured.of(r.test.ece for r in group.results)),
            Measured.of(map(_confidence, group.results)).mean_text(1),
            str(Measured.of(r.test.accuracy for r in group.results)),
            Measured.of(r.test.nll for r in group.results).mean_text(3),
        )
        for group in groups
    )
    return TextTable(
        ("calibration", "ECE, %", "mean confidence, %", "accuracy, %", "NLL, nats"), rows
    )


def calibrated_table(runs: Sequence[Run]) -> TextTable:
    """Return the validation scores of calibrated runs, as trained and calibrated."""
    rows = []
    for run in runs:
        if run.calibration is None:
            continue
        scores = {score.calibrator: score for score in run.calibration.scores}
        judged = [scores["none"], scores[run.calibration.calibrator]]
        rows.append(
            (
                run.folder if run.folder not in ("", ".") else run.name,
                run.calibration.described,
                str(run.calibration.images),
                *(f"{score.balanced:.2f}" for score in judged),
                *(f"{score.nll:.4f}" for score in judged),
            )
        )
    header = (
        "calibrated run",
        "calibration",
        "validation images",
        "balanced as trained, %",
        "balanced calibrated, %",
        "NLL with temperature only, nats",
        "NLL calibrated, nats",
    )
    return TextTable(header, tuple(rows))


def _confidence(result: Result) -> float | None:
    bins = result.test.bins
    return None if bins is None else sum(each.share * each.confidence for each in bins) / 100


_CONFUSIONS = 5
"""Pairs of classes that are shown, those that are confused most often."""


def confusions_table(groups: Sequence[Group]) -> tuple[TextTable, list[int]]:
    """Return the pairs of classes that each group of runs confuses most often, over all its seeds.

    Returns:
        The table, and the place of the group of each row.
    """
    rows: list[tuple[str, ...]] = []
    places: list[int] = []
    for place, group in enumerate(groups):
        names, summed = group.first.class_names, confusion(group)
        images = {label: 0 for label, _ in summed}
        for (label, _), count in summed.items():
            images[label] += count
        wrong = sorted((-n, i, j) for (i, j), n in summed.items() if i != j)
        places += [place] * len(wrong[:_CONFUSIONS])
        rows += [
            (group.name, names[i], names[j], str(-n), f"{-100 * n / images[i]:.1f}")
            for n, i, j in wrong[:_CONFUSIONS]
        ]
    header = ("most frequent confusions", "class", "taken for", "images", "% of the class")
    return TextTable(header, tuple(rows)), places


def confusion(group: Group) -> dict[tuple[int, int], int]:
    """Return how many images of one class were taken for another, over all runs of a group."""
    summed: dict[tuple[int, int], int] = {}
    for result in group.results:
        for true, taken, images in result.test.confusion:
            summed[true, taken] = summed.get((true, taken), 0) + images
    return summed


def runs_table(runs: Sequence[Run]) -> TextTable:
    """Where each run lies and what made it; empty where older runs do not say."""
    rows = []
    for run in runs:
        origin = run.result.origin
        made = ("", "", "", "")
        if origin is not None:
            made = (origin.date, origin.version, _short(origin.commit), origin.command)
        seeds = (setting_text(run.result.config.get(name)) for name in SEEDS)
        rows.append((run.folder or "-", run.name, *seeds, run.result.rule, *made))
    header = ("folder", "run", *SEEDS, "judged", "date", "version", "commit", "command")
    return TextTable(header, tuple(rows))


def _short(commit: str | None) -> str:
    """Twelve digits of a commit, and whether files were changed."""
    digits, _, state = (commit or "").partition("-")
    return f"{digits[:12]}-{state}" if state else digits[:12]


def differing_settings(groups: Sequence[Group]) -> TextTable:
    """Return a table of the settings and environments in which the groups differ."""
    columns = {
        name: [setting_text(group.first.config.get(name)) for group in groups]
        for name in _setting_names(groups)
    } | {
        name: [str(group.first.environment.get(name, "")) for group in groups]
        for name in dict.fromkeys(key for group in groups for key in group.first.environment)
    }
    columns = {name: values for name, values in columns.items() if len(set(values)) > 1}
    rows = zip((group.name for group in groups), *columns.values(), strict=True)
    return TextTable(("settings that differ", *columns), tuple(rows))


def settings_table(groups: Sequence[Group]) -> TextTable:
    """Every setting with its value and where it comes from; settings that no run has are left out."""
    rows = []
    for name in _setting_names(groups):
        results = [group.first for group in groups]
        sources = {result.sources[name]: None for result in results if name in result.sources}
        values = {setting_text(result.config.get(name)): None for result in results}
        value = next(iter(values)) if len(values) == 1 else "differs"
        rows.append((name, value, "; ".join(sources)))
    return TextTable(("setting", "value", "source"), tuple(rows))


def _setting_names(groups: Sequence[Group]) -> list[str]:
    names = dict.fromkeys(name for group in groups for name in settings_in(group.first.config))
    return [name for name in names if name not in SEEDS]


def environment_table(groups: Sequence[Group]) -> TextTable:
    """Versions and device, as far as they are the same, and the SHA-256 of the training images."""
    first, *others = [group.first for group in groups]
    shared = {
        name: value
        for name, value in first.environment.items()
        if all(other.environment.get(name) == value for other in others)
    }
    hashes = dict.fromkeys(str(r.subset_hash) for group in groups for r in group.results)
    rows = [(name, str(value)) for name, value in shared.items()]
    rows += [("training set, SHA-256", each) for each in hashes]
    return TextTable(("environment", "value"), tuple(rows))


_LONG_NAMES = {
    "harmonic_mean": "harmonic mean of classes",
    "worst_class": "worst class",
    "top5": "top-5",
    "macro_f1": "macro F1",
    "nll": "NLL, nats",
    "ece": "calibration error",
}


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


def confusion_table(evaluation: Evaluation) -> TextTable:
    """Return the pairs of classes that are confused most often."""
    wrong = [entry for entry in evaluation.metrics.confusion if entry[0] != entry[1]]
    wrong.sort(key=lambda entry: -entry[2])
    names = evaluation.class_names
    rows = tuple((f"{names[i]} as {names[j]}", str(n)) for i, j, n in wrong[:_CONFUSIONS])
    return TextTable(("most frequent confusions", "images"), rows)


def spectrum_table(
    spectra: Sequence[ClassSpectrum], names: Sequence[str] | None = None
) -> TextTable:
    """Both extremes with their Ritz residual bounds, and what is needed to judge them.

    Args:
        spectra: one for each row.
        names: of their runs; by default those that the spectra have.
    """
    rows = []
    several = len({item.subject.epoch for item in spectra}) > 1
    for place, item in enumerate(spectra):
        spectrum, subject = item.spectrum, item.subject
        rows.append(
            (
                f"{names[place] if names else subject.run}, "
                f"{f'epoch {subject.epoch}, ' if several else ''}{subject.whose} "
                f"({subject.of})" + (" RE-DRAWN" if subject.augment == REDRAWN else ""),
                _with_error(spectrum.lambda_max, spectrum.lambda_max_residual),
                _with_error(spectrum.lambda_min, spectrum.lambda_min_residual),
                _ratio(item),
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


def _ratio(item: ClassSpectrum) -> str:
    """Return the ratio of the extremes with its bounds; ``-`` if lambda_max is 0."""
    ratio, (low, high) = item.spectrum.ratio, item.ratio_bounds
    return "-" if math.isnan(ratio) else f"{ratio:.4f} [{low:.4f}, {high:.4f}]"


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g} +- {error:.1g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
