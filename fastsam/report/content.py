"""What a report says, section by section: sentences, figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from fastsam.files import write_text
from fastsam.longtail.landscape import REDRAWN
from fastsam.report import charts, formats, tables
from fastsam.report.charts import Chart
from fastsam.report.collect import Runs
from fastsam.report.comparison import PairedPanel
from fastsam.report.formats import Format
from fastsam.report.groups import Group, by_settings, data_title, places_of, with_the_same_classes
from fastsam.report.marks import marks
from fastsam.report.pairs import panels_of
from fastsam.report.spectra import run_spectra, spectra_charts
from fastsam.report.text_table import TextTable
from fastsam.report.training_charts import curvature, training

MOST_CELLS = 5000
"""Cells of a table of classes above which the page does without it."""
_BAND = (
    "Dots are seeds. The band is plus or minus one point. “No difference”: the interval lies inside it. "
    "“Better” and “worse”: the interval excludes 0 and reaches beyond the band. “Undecided”: it includes 0 "
    "and reaches beyond the band. “Unknown”: a seed lacks the score. "
    "Intervals cover 95 % and are not corrected for the number of comparisons."
)
_CALIBRATED = (
    "The second table lists the runs that `fastsam calibrate` has calibrated. All other numbers of this "
    "page are those of runs as trained; `fastsam evaluate` evaluates a calibrated run on its test set."
)
_SPECTRA = (
    "Density of the eigenvalues of the Hessian of the mean loss of one class, from Lanczos runs with full "
    "re-orthogonalization, on shared axes. Points on the floor are the extremes; an eigenvalue lies "
    "within the stated distance of each. Negative curvature is a saddle only where the gradient is small, "
    "and curvature scales with the weights."
)
_MISTAKE = (
    "Here a new training augmentation is drawn at every Hessian-vector product, as published tools do. "
    "The product is then no longer that of one Hessian: the noise enters the off-diagonal of the Lanczos "
    "matrix and drives the extremes towards symmetry about 0, also where every single Hessian is positive "
    "semi-definite. These numbers are not curvature."
)


@dataclass(frozen=True)
class PageTable:
    """A table of the page.

    Attributes:
        name: name of its files.
        caption: what it shows.
        content: header and rows.
        rows: place of the group of runs that each row is about; empty where rows are about no single one.
        columns: the same for columns.
        folded: shown only when the reader asks for it.
    """

    name: str
    caption: str
    content: TextTable
    rows: Sequence[int | None] = ()
    columns: Sequence[int | None] = ()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page under one heading.

    Attributes:
        title: the heading.
        text: paragraphs.
        verdicts: sentences that stand out, each with the numbers behind it.
        charts: the figures.
        tables: the tables.
        choice: place and name of the group that each chart is about, where one is shown at a time.
        square: whether figures are about as wide as high.
        warning: what is shown is a mistake.
    """

    title: str
    text: Sequence[str] = ()
    verdicts: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[PageTable] = ()
    choice: Sequence[tuple[int, str]] = ()
    square: bool = False
    warning: bool = False


def sections(runs: Runs) -> list[Section]:
    """Return the sections of a page; those without content are left out."""
    groups = by_settings(runs.runs)
    alike = with_the_same_classes(groups)
    found = [
        *_differences(runs, groups),
        _accuracy(groups),
        *(_classes(groups, places, several=len(alike) > 1) for places in alike),
        _confusion(groups),
        _calibration(groups, runs),
        _training(groups),
        *_spectra(runs, groups),
        *(
            []
            if runs.timing is None
            else [Section("Cost of the SAM step", [runs.timing.sentence()])]
        ),
        _provenance(runs, groups),
        _settings(groups),
    ]
    return [section for section in found if section.charts or section.tables or section.text]


def write_tables(runs: Runs, folder: str | Path) -> list[Path]:
    """Write every table of the page as CSV, Markdown and LaTeX into ``folder``, and return the paths."""
    paths = []
    for section in sections(runs):
        for table in section.tables:
            for format in get_args(Format):
                path = Path(folder, f"{table.name}.{format}")
                write_text(path, formats.text(table.content, format))
                paths.append(path)
    return paths


def _differences(runs: Runs, groups: Sequence[Group]) -> Iterable[Section]:
    """Return the comparison in a file, or else those of runs that differ only in their optimizer."""
    found: dict[str, list[PairedPanel]] = {}
    for panel in panels_of(runs, groups):
        found.setdefault(panel.title, []).append(panel)
    for number, (title, panels) in enumerate(found.items(), 1):
        suffix = f"-{number}" if len(found) > 1 else ""
        every = [panel.differences() for panel in panels]
        content = TextTable(every[0].header, tuple(row for table in every for row in table.rows))
        shown = [PageTable(f"differences{suffix}", "Paired differences", content)]
        if runs.comparison is not None:
            caption = "Test accuracy of each way to train, in percent"
            shown.append(PageTable(f"arms{suffix}", caption, panels[0].table()))
        seeds = " or ".join(map(str, sorted({panel.seeds for panel in panels})))
        counted = f"{seeds} paired seed{'' if seeds == '1' else 's'}."
        yield Section(
            f"Differences: {title}",
            [counted, *([_BAND] if number == 1 else [])],
            [verdict for panel in panels for verdict in panel.verdicts()],
            charts.differences(panels),
            shown,
        )


def _accuracy(groups: Sequence[Group]) -> Section:
    rules = dict.fromkeys(group.first.rule for group in groups)
    content = tables.accuracy_table(groups)
    caption = "Test accuracy, calibration error and cost; mean ± standard deviation over seeds"
    return Section(
        "Accuracy",
        [f"Accuracies are those of the {', '.join(rules)} on the test set."],
        charts=[charts.accuracy(groups)],
        tables=[PageTable("accuracy", caption, content, range(len(groups)))],
    )


def _classes(groups: Sequence[Group], places: Sequence[int], *, several: bool) -> Section:
    mine = [groups[place] for place in places]
    title = "Accuracy by class"
    if several:
        title += f": {', '.join(dict.fromkeys(data_title(group.first) for group in mine))}"
    chart = charts.class_accuracy(mine, places)
    cells = len(mine) * len(mine[0].first.class_names)
    if cells > MOST_CELLS:
        text = f"The table would have {cells} cells; per_class.csv of each run holds the numbers."
        return Section(title, [text], charts=[chart])
    content = tables.class_accuracy_table(mine)
    name = f"classes-{places[0] + 1}" if several else "classes"
    table = PageTable(
        name, "Test accuracy of each class, in percent", content, (), (None, None, None, *places)
    )
    return Section(title, charts=[chart], tables=[table])


def _confusion(groups: Sequence[Group]) -> Section:
    matrices = [charts.confusion_matrix(place, group) for place, group in enumerate(groups)]
    choice = [(i, group.name) for i, group in enumerate(groups) if matrices[i] is not None]
    content, places = tables.confusions_table(groups)
    text = ["Share of each class that was taken for each class, over all seeds of the runs."]
    if not choice:
        text = [f"No matrix is shown for more than {charts.MATRIX_CLASSES} classes."]
    return Section(
        "Confusion",
        text,
        charts=[matrix for matrix in matrices if matrix is not None],
        tables=[PageTable("confusions", "Classes that are confused most often", content, places)],
        choice=choice,
        square=True,
    )


def _calibration(groups: Sequence[Group], runs: Runs) -> Section:
    lacking = [group.name for group in groups if any(r.test.bins is None for r in group.results)]
    caption = "Calibration on the test set"
    shown = [
        PageTable("calibration", caption, tables.calibration_table(groups), range(len(groups)))
    ]
    text = _left_out("bins of confidence, so no line in the figure", lacking)
    calibrated = [run for run in runs.runs if run.calibration is not None]
    if calibrated:
        text.append(_CALIBRATED)
        place_of = places_of(groups)
        places = [place_of.get(id(run)) for run in calibrated]
        caption = "Scores on the validation images, as trained and calibrated"
        content = tables.calibrated_table(calibrated)
        shown.append(PageTable("calibrated", caption, content, places))
    return Section(
        "Calibration",
        text,
        charts=[charts.reliability(groups)] if len(lacking) < len(groups) else [],
        tables=shown,
        square=True,
    )


def _training(groups: Sequence[Group]) -> Section:
    text = []
    for mark in marks(groups):
        if len(mark.places) == len(groups):
            who = "all runs"
        else:
            who = "; ".join(groups[place].label for place in mark.places)
        text.append(f"After epoch {mark.after}, {mark.kind}: {who}.")
    return Section("Training", text, charts=[*training(groups), *curvature(groups)])


def _spectra(runs: Runs, groups: Sequence[Group]) -> Iterable[Section]:
    found = run_spectra(runs, groups)
    sound = [each for each in found if each.item.subject.augment != REDRAWN]
    mistaken = [each for each in found if each.item.subject.augment == REDRAWN]
    for title, text, items in (
        ("Hessian spectra by class", _SPECTRA, sound),
        ("A mistake, on purpose", _MISTAKE, mistaken),
    ):
        if items:
            content = tables.spectrum_table(
                [each.item for each in items], [each.name for each in items]
            )
            name = "spectra" if items is sound else "mistaken-spectra"
            caption = "Extreme eigenvalues, each with its Ritz residual bound"
            table = PageTable(name, caption, content, [each.place for each in items])
            yield Section(
                title,
                [text],
                charts=spectra_charts(items),
                tables=[table],
                warning=items is mistaken,
            )


def _provenance(runs: Runs, groups: Sequence[Group]) -> Section:
    place_of = places_of(groups)
    lacking = [run.folder or run.name for run in runs.runs if run.result.origin is None]
    repeated = [run.folder for run in runs.runs if id(run) not in place_of]
    places = [place_of.get(id(run)) for run in runs.runs]
    caption = "Folder, seeds and origin of each run; dates are the ends of the runs, in UTC"
    return Section(
        "Origin of the runs",
        [*_left_out("date, version and command", lacking), *_repetitions(repeated)],
        tables=[PageTable("runs", caption, tables.runs_table(runs.runs), places)],
    )


def _repetitions(folders: Sequence[str]) -> list[str]:
    """One sentence about the runs that no group contains."""
    if not folders:
        return []
    return [
        "Only the tables of runs contain these folders, because another run has their settings and seeds: "
        f"{'; '.join(folders)}."
    ]


def _settings(groups: Sequence[Group]) -> Section:
    differing = tables.differing_settings(groups)
    shown = [
        PageTable(
            "settings", "Every setting and its source", tables.settings_table(groups), folded=True
        ),
        PageTable("environment", "Environment", tables.environment_table(groups), folded=True),
    ]
    text = []
    if len(differing.header) > 1:
        caption = "Settings and environment, where runs differ"
        shown.insert(0, PageTable("differing", caption, differing, range(len(groups))))
    else:
        text = ["All runs have the same settings, but for their seeds."] if len(groups) > 1 else []
    return Section("Settings", text, tables=shown)


def _left_out(what: str, lacking: Sequence[str]) -> list[str]:
    """One sentence about what results of older versions do not have."""
    return [f"Results of an older version have no {what}: {'; '.join(lacking)}."] if lacking else []
