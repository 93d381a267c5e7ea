"""One self-contained HTML page about one or more training runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TypeVar

from fastsam.files import write_text
from fastsam.longtail.config import OPTIMIZERS
from fastsam.longtail.errors import DataError
from fastsam.longtail.landscape import REDRAWN, ClassSpectrum
from fastsam.longtail.results import Result
from fastsam.report.figures import accuracy_bars, spectra_panels, training_curves
from fastsam.report.tables import (
    Table,
    accuracy_table,
    by_settings,
    run_name,
    settings_table,
    spectrum_table,
)
from fastsam.report.timing import StepTiming
from fastsam.text import notice

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
.mistake { border-left: 4px solid #b22222; padding-left: 1em; }
"""


_Item = TypeVar("_Item")


def read_runs(folder: Path) -> tuple[list[Result], list[ClassSpectrum], StepTiming | None]:
    """Everything that runs left in ``folder`` and the folders below it, plain optimizers first.

    Files of these names that are damaged or not ours are left out; one line each on standard error
    says so.

    Raises:
        DataError: if there is no result at all.
    """
    results = _readable(Result.load, folder.rglob("result.json"))
    if not results:
        raise DataError(
            f"no result.json in {folder} or below it; run `fastsam train --out {folder}`"
        )
    results.sort(key=lambda result: _place(run_name(result)))
    spectra = _readable(ClassSpectrum.load, folder.rglob("class-*.json"))
    spectra.sort(key=lambda item: (_order(item.subject.label), _place(item.subject.run)))
    timing = folder / StepTiming.FILE
    timings = _readable(StepTiming.load, [timing] if timing.is_file() else [])
    return results, spectra, timings[0] if timings else None


def _readable(load: Callable[[Path], _Item], paths: Iterable[Path]) -> list[_Item]:
    """What ``load`` makes of the files that it can read."""
    items = []
    for path in sorted(paths):
        try:
            items.append(load(path))
        except (DataError, OSError) as error:
            notice(f"left out: {error}")
    return items


def _order(label: int | None) -> int:
    """Sorts spectra by class, that of all classes first."""
    return -1 if label is None else label


def _place(run: str) -> tuple[str, int]:
    """Sorts runs by method, then in the order in which the optimizers are listed."""
    method, _, optimizer = run.partition(" ")
    return method, list(OPTIMIZERS).index(optimizer) if optimizer in OPTIMIZERS else len(OPTIMIZERS)


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html`` about the runs in ``folder`` and return its path.

    The page holds its figures and needs no other file and no network.
    """
    page = folder / "report.html"
    write_text(page, render(*read_runs(folder)))
    return page


def render(
    results: Sequence[Result], spectra: Sequence[ClassSpectrum], timing: StepTiming | None
) -> str:
    """The page as HTML text."""
    first = results[0]
    sets = dict.fromkeys((_title(result), tuple(result.counts)) for result in results)
    titles = dict.fromkeys(title for title, _ in sets)
    sections = [
        f"<h1>fastsam: {escape('; '.join(titles))}</h1>",
        *(
            f"<p>{escape(title)}: {sum(counts)} training images in {len(counts)} classes, "
            f"{max(counts)} in the largest and {min(counts)} in the smallest.</p>"
            for title, counts in sets
        ),
        f"<p>Accuracies are those of the {escape(_rules(results))} on the test set.</p>",
        "<h2>Accuracy</h2>",
        accuracy_bars(results),
        _html(accuracy_table(results)),
        "<h2>Training</h2>",
        training_curves(results),
    ]
    sound = [item for item in spectra if item.subject.augment != REDRAWN]
    mistaken = [item for item in spectra if item.subject.augment == REDRAWN]
    if sound:
        sections += [
            "<h2>Hessian spectra by class</h2>",
            "<p>Density of the eigenvalues of the Hessian of the mean loss of one class, from "
            "Lanczos runs with full re-orthogonalisation. An eigenvalue lies within the stated "
            "distance of each extreme. Negative curvature is a saddle only where the gradient is "
            "small, and curvature scales with the weights.</p>",
            spectra_panels(sound),
            _html(spectrum_table(sound)),
        ]
    if mistaken:
        sections += [
            '<div class="mistake"><h2>A mistake, on purpose</h2>',
            "<p>Here the training augmentation is drawn anew at every Hessian-vector product, as "
            "published tools do. There is then no one Hessian: the noise enters the off-diagonal "
            "of the Lanczos matrix and drives the extremes towards symmetry about 0, also where "
            "every single Hessian is positive semi-definite. These numbers are not curvature.</p>",
            spectra_panels(mistaken),
            _html(spectrum_table(mistaken)),
            "</div>",
        ]
    if timing is not None:
        sections += ["<h2>Cost of the SAM step</h2>", f"<p>{escape(timing.sentence())}</p>"]
    shown = [members[0] for members in by_settings(results).values()]
    sections += ["<h2>Settings</h2>", _html(settings_table(shown)), "<h2>Environment</h2>"]
    rows = [(name, str(value)) for name, value in first.environment.items()]
    rows.append(("training set, SHA-256", str(first.subset_hash)))
    sections.append(_html(Table(("", ""), tuple(rows))))
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8"><title>fastsam report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _title(result: Result) -> str:
    """The data of a run, with its imbalance where it was made long-tailed."""
    imbalance = result.config.get("imbalance")
    return str(result.config["data"]) + ("" if imbalance is None else f", imbalance {imbalance:g}")


def _rules(results: Sequence[Result]) -> str:
    """Which epochs the runs were judged at."""
    return ", ".join(dict.fromkeys(result.rule for result in results))


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
