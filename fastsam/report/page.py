"""One self-contained HTML page about one or more training runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastsam.extras import requires_extra
from fastsam.files import write_text
from fastsam.longtail.errors import DataError
from fastsam.longtail.landscape import REDRAWN, ClassSpectrum
from fastsam.longtail.results import Result
from fastsam.report.comparison import PairedComparison
from fastsam.report.figures import (
    accuracy_bars,
    comparison_svg,
    spectra_panels,
    training_curves,
)
from fastsam.report.tables import (
    TextTable,
    accuracy_table,
    by_settings,
    run_name,
    settings_table,
    spectrum_table,
)
from fastsam.report.timing import StepTiming
from fastsam.text import notice

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Runs:
    """What a page is about.

    Attributes:
        results: of every run.
        spectra: of classes, at the weights of these runs.
        comparison: of ways to train over several seeds.
        timing: of the optimizer part of the SAM step.
    """

    results: Sequence[Result]
    spectra: Sequence[ClassSpectrum] = ()
    comparison: PairedComparison | None = None
    timing: StepTiming | None = None


def read_runs(folder: str | Path) -> Runs:
    """Read the results and spectra in ``folder`` and below it, its comparison and its timing.

    Runs are sorted by method, then by optimizer, plain ones first. A file that is damaged or was not
    written by fastsam is skipped, with one line on standard error.

    Raises:
        DataError: there is no result at all.
    """
    folder = Path(folder)
    results = _readable(Result.load, folder.rglob("result.json"))
    if not results:
        raise DataError(
            f"no result.json in {folder} or below it; run `fastsam train --out {folder}`"
        )
    results.sort(key=lambda result: _place(run_name(result)))
    spectra = _readable(ClassSpectrum.load, folder.rglob("class-*.json"))
    spectra.sort(key=lambda item: (_order(item.subject.label), _place(item.subject.run)))
    return Runs(
        results,
        spectra,
        _readable_file(PairedComparison.load, folder / PairedComparison.FILE),
        _readable_file(StepTiming.load, folder / StepTiming.FILE),
    )


def _readable_file(load: Callable[[Path], _Item], path: Path) -> _Item | None:
    """Load a file that may not exist; report one that cannot be read."""
    items = _readable(load, [path] if path.is_file() else [])
    return items[0] if items else None


def _readable(load: Callable[[Path], _Item], paths: Iterable[Path]) -> list[_Item]:
    """Load the files that ``load`` can read, and report the others."""
    items = []
    for path in sorted(paths):
        try:
            items.append(load(path))
        except (DataError, OSError) as error:
            notice(f"left out: {error}")
    return items


def _order(label: int | None) -> int:
    """Return a sort key for spectra: by class, that of all classes first."""
    return -1 if label is None else label


def _place(run: str) -> tuple[str, bool, str]:
    """Sorts runs by method, SGD before the optimizers that are compared with it."""
    method, _, optimizer = run.partition(" ")
    return method, optimizer != "sgd", optimizer


def write_report(folder: str | Path) -> Path:
    """Write ``folder/report.html`` about the runs in ``folder`` and return its path.

    The page holds its figures and needs no other file and no network.
    """
    page = Path(folder, "report.html")
    write_text(page, render(read_runs(folder)))
    return page


def render(runs: Runs) -> str:
    """Return the page as HTML text.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    with requires_extra("longtail", "the report"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup

    results, comparison = runs.results, runs.comparison
    figures = {"accuracy": accuracy_bars(results), "training": training_curves(results)}
    tables = {
        "accuracy": accuracy_table(results),
        "settings": settings_table([members[0] for members in by_settings(results).values()]),
        "environment": _environment_table(results[0]),
    }
    if comparison is not None:
        figures["comparison"] = comparison_svg(comparison)
    sound = [item for item in runs.spectra if item.subject.augment != REDRAWN]
    mistaken = [item for item in runs.spectra if item.subject.augment == REDRAWN]
    for name, items in (("spectra", sound), ("mistakes", mistaken)):
        if items:
            figures[name], tables[name] = spectra_panels(items), spectrum_table(items)
    # Autoescape everything but the figures, which are SVG.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.jinja").render(
        titles=dict.fromkeys(map(_title, results)),
        sets=_sets(results),
        rules=", ".join(dict.fromkeys(result.rule for result in results)),
        figures={name: Markup(figure) for name, figure in figures.items()},
        tables=tables,
        comparison=comparison,
        timing=None if runs.timing is None else runs.timing.sentence(),
    )


def _sets(results: Sequence[Result]) -> list[str]:
    """Describe each data set once; wrong labels make the counts of its classes differ between seeds."""
    counts: dict[tuple[str, int, int], list[Sequence[int]]] = {}
    for result in results:
        key = _title(result), sum(result.counts), len(result.counts)
        counts.setdefault(key, []).append(result.counts)
    return [
        f"{title}: {images} training images in {classes} classes, {_range(map(max, members))} in the "
        f"largest and {_range(map(min, members))} in the smallest."
        for (title, images, classes), members in counts.items()
    ]


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _environment_table(result: Result) -> TextTable:
    rows = [(name, str(value)) for name, value in result.environment.items()]
    rows.append(("training set, SHA-256", str(result.subset_hash)))
    return TextTable(("", ""), tuple(rows))


def _title(result: Result) -> str:
    """Return the data set of a run, with its imbalance and wrong labels where they were made."""
    imbalance, noise = result.config.get("imbalance"), result.config.get("label_noise")
    parts = [str(result.config["data"])]
    if imbalance is not None:
        parts.append(f"imbalance {imbalance:g}")
    if noise:
        parts.append(f"{100 * noise:g} % wrong labels")
    return ", ".join(parts)
