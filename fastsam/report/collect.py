"""The runs of a folder, with what belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.errors import CheckpointError, DataError
from fastsam.longtail.landscape import ClassSpectrum
from fastsam.longtail.results import Result
from fastsam.longtail.trained.calibration import Calibration, calibration_path
from fastsam.report.comparison import PairedComparison
from fastsam.report.timing import StepTiming
from fastsam.text import notice, printable

_Item = TypeVar("_Item")
_BEGUN = ("checkpoint.pt", "run.yaml")
"""Files of a run that has begun."""


@dataclass(frozen=True)
class Run:
    """A run and where it lies.

    Attributes:
        result: what it found.
        folder: its folder, relative to that of the report; empty if it has none.
        spectra: spectra of classes at its weights.
        calibration: what `fastsam calibrate` wrote beside it; None without one.
    """

    result: Result
    folder: str = ""
    spectra: Sequence[ClassSpectrum] = ()
    calibration: Calibration | None = None

    @property
    def name(self) -> str:
        """How the run is called: ``method optimizer``."""
        return f"{self.result.config['method']} {self.result.config['optimizer']}"


@dataclass(frozen=True)
class Runs:
    """What a report is about.

    Attributes:
        runs: the runs.
        strays: spectra of classes in folders of no run.
        comparison: of ways to train over several seeds.
        timing: of the optimizer part of the SAM step.
    """

    runs: Sequence[Run]
    strays: Sequence[ClassSpectrum] = ()
    comparison: PairedComparison | None = None
    timing: StepTiming | None = None

    @property
    def results(self) -> list[Result]:
        """The results of all runs."""
        return [run.result for run in self.runs]

    @property
    def spectra(self) -> list[ClassSpectrum]:
        """All spectra: by class, that of all classes first, then by run."""
        found = [item for run in self.runs for item in run.spectra] + list(self.strays)
        return sorted(found, key=lambda item: (class_order(item), _place(item.subject.run)))


def read_runs(folder: str | Path) -> Runs:
    """Read the results and spectra in ``folder`` and below it, its comparison and its timing.

    Runs are sorted by method, then by optimizer, plain ones first. A run that is not finished, and a file
    that is damaged or was not written by fastsam, are left out with one line on standard error.

    Raises:
        DataError: there is no result at all.
    """
    folder = Path(folder)
    results = dict(_readable(Result.load, folder.rglob("result.json")))
    _report_unfinished(folder)
    if not results:
        raise DataError(
            f"no result.json in {folder} or below it; run `fastsam train --out {folder}`"
        )
    spectra: dict[Path | None, list[ClassSpectrum]] = {}
    homes = {path.parent for path in results}
    for path, spectrum in _readable(ClassSpectrum.load, folder.rglob("class-*.json")):
        home = next((parent for parent in path.parents if parent in homes), None)
        spectra.setdefault(home, []).append(spectrum)
    for items in spectra.values():
        items.sort(key=class_order)
    runs = [
        Run(
            result,
            _relative(path.parent, folder),
            spectra.get(path.parent, ()),
            _calibration(path.parent),
        )
        for path, result in results.items()
    ]
    return Runs(
        sorted(runs, key=lambda run: _place(run.name)),
        spectra.get(None, ()),
        _readable_file(PairedComparison.load, folder / PairedComparison.FILE),
        _readable_file(StepTiming.load, folder / StepTiming.FILE),
    )


def _report_unfinished(folder: Path) -> None:
    """Report the runs in ``folder`` that have a checkpoint or settings, but no result."""
    begun = {found.parent for name in _BEGUN for found in folder.rglob(name)}
    for path in sorted(begun):
        if (path / "result.json").exists():
            continue
        errors = sorted(path.glob("error-rank-*.txt"))
        if errors:
            lines = errors[0].read_text("utf-8", "replace").splitlines() or ["unknown error"]
            notice(f"left out: {path} failed: {lines[0]}")
            continue
        if not (path / "checkpoint.pt").exists():
            notice(
                f"left out: {path} is not finished; `fastsam train --resume --out {path}` continues it"
            )
            continue
        try:
            found = Checkpoint.load(path)
        except (CheckpointError, OSError) as error:
            notice(f"left out: {error}")
        else:
            notice(
                f"left out: {path} is not finished (epoch {found.epoch} of {found.config.epochs})"
            )


def _calibration(folder: Path) -> Calibration | None:
    """Load the calibration of a run; None without one. Report one that cannot be read."""
    path = calibration_path(folder)
    try:
        return Calibration.load(path) if path.is_file() else None
    except (CheckpointError, OSError) as error:
        notice(f"left out: {error}")
        return None


def _relative(path: Path, folder: Path) -> str:
    return printable(str(path.relative_to(folder)))


def _readable_file(load: Callable[[Path], _Item], path: Path) -> _Item | None:
    """Load a file that may not exist; report one that cannot be read."""
    items = _readable(load, [path] if path.is_file() else [])
    return items[0][1] if items else None


def _readable(load: Callable[[Path], _Item], paths: Iterable[Path]) -> list[tuple[Path, _Item]]:
    """Load the files that ``load`` can read, and report the others."""
    items = []
    for path in sorted(paths):
        try:
            items.append((path, load(path)))
        except (DataError, OSError) as error:
            notice(f"left out: {error}")
    return items


def class_order(item: ClassSpectrum) -> int:
    """Return a sort key for spectra: by class, that of all classes first."""
    return -1 if item.subject.label is None else item.subject.label


def _place(run: str) -> tuple[str, bool, str]:
    """Sorts runs by method, SGD before the optimizers that are compared with it."""
    method, _, optimizer = run.partition(" ")
    return method, optimizer != "sgd", optimizer
