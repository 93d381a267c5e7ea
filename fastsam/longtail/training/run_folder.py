"""The folder that keeps a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastsam.csv_text import csv_line
from fastsam.files import OWN_FILES, locked, write_text
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.results import Epoch, Result

RUN_FILES = (
    *("checkpoint.pt", "epoch-*.pt", "result.json", "history.csv", "per_class.csv", "run.yaml"),
    *("calibration.json", "*.calibration.json"),
)
"""Names of the files that a run's folder holds."""


class RunFolder:
    """The files of one run.

    Attributes:
        checkpoint: state after the last completed epoch that was written.
        result: the :class:`Result` as JSON.
        history: one line per epoch, CSV.
        per_class: one line per class, CSV.
        settings: the settings, which train the run again; see :mod:`fastsam.longtail.run_file`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.pt"
        self.result = self.path / "result.json"
        self.history = self.path / "history.csv"
        self.per_class = self.path / "per_class.csv"
        self.settings = self.path / "run.yaml"

    def kept(self, epoch: int) -> Path:
        """Where the checkpoint of an epoch lies that was asked to be kept."""
        return self.path / f"epoch-{epoch}.pt"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there, the newest first.

        Between two writes of ``checkpoint``, a kept one may be all that a killed run has left.
        """
        stems = [path.stem.removeprefix("epoch-") for path in self.path.glob("epoch-*.pt")]
        epochs = sorted((int(stem) for stem in stems if stem.isdecimal()), reverse=True)
        files = [self.checkpoint, *map(self.kept, epochs)]
        return [path for path in files if path.is_file()]

    def stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What differs after any other process wrote a checkpoint or a result."""
        return tuple(_stamp(path) for path in (self.checkpoint, self.result))

    @contextmanager
    def held(self, stamp: object) -> Iterator[None]:
        """Keep other processes out of the folder; see :func:`fastsam.files.locked`.

        Args:
            stamp: what :meth:`stamp` was when the run was set up.

        Raises:
            FolderBusyError: another process has the folder.
            CheckpointError: another process had it since then.
        """
        with locked(self.path):
            if self.stamp() != stamp:
                raise CheckpointError(
                    f"another process wrote to {self.path} after this run was set up; start again"
                )
            yield

    def check(self, *, resume: bool = False, overwrite: bool = False, writes: bool = True) -> None:
        """Make sure that nothing of value is in the way, and that no other run is at work.

        Args:
            resume: the folder holds a run to go on with.
            overwrite: the files of a previous run may be removed.
            writes: whether this process will write to it.

        Raises:
            UsageError: if the folder is not empty and neither flag is given, or both are.
            FolderBusyError: if another process writes to it.
        """
        if resume and overwrite:
            raise UsageError("choose one of --resume and --overwrite")
        check_free(self.path, allowed=resume or overwrite, flags="--resume or --overwrite")
        if writes and self.path.is_dir():
            with locked(self.path):
                pass

    def prepare(self, *, overwrite: bool = False) -> None:
        """Create the folder.

        Args:
            overwrite: remove what a previous run wrote, its calibrations, and the spectra of its weights in
                the folder or in ``spectra`` below it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            left = (
                "epoch-*.pt",
                "tensorboard/events.*",
                "calibration.json",
                "epoch-*.calibration.json",
            )
            spectra = ("class-*.json", "spectra.svg", "spectra/class-*.json", "spectra/spectra.svg")
            old = [file for pattern in left + spectra for file in self.path.glob(pattern)]
            tables = (self.history, self.per_class, self.settings)
            for file in (self.checkpoint, self.result, *tables, *old):
                file.unlink(missing_ok=True)

    def coming_checkpoints(self, keep: Collection[int]) -> int:
        """Return how many checkpoints a run will write beside those that are there.

        Args:
            keep: epochs whose checkpoints are kept.
        """
        missing = sum(not self.kept(epoch).is_file() for epoch in keep)
        # A checkpoint is written beside the one that it replaces.
        return 1 + (not self.checkpoint.is_file()) + missing

    def write_settings(self, text: str) -> None:
        """Write the file of settings, unless the run has one already."""
        if not self.settings.is_file():
            write_text(self.settings, text)

    def write(self, result: Result) -> None:
        """Write the result as JSON and as two CSV tables, each atomically."""
        write_text(self.result, result.to_json())
        self.write_history(result.history)
        group_of = {label: name for name, members in result.groups.items() for label in members}
        classes = [
            (label, name, group_of.get(label, ""), result.counts[label], share)
            for label, (name, share) in enumerate(
                zip(result.class_names, result.test.per_class, strict=True)
            )
        ]
        header = ("class", "name", "group", "training_images", "test_accuracy")
        write_text(self.per_class, "".join(map(csv_line, (header, *classes))))

    def write_history(self, history: Sequence[Epoch]) -> None:
        """Write the epochs so far as a CSV table, atomically."""
        names = list(Epoch.__dataclass_fields__)
        rows = [[getattr(epoch, name) for name in names] for epoch in history]
        write_text(self.history, "".join(map(csv_line, (names, *rows))))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_free(path: str | Path, *, allowed: bool, flags: str) -> None:
    """Raise :class:`UsageError` if ``path`` is a file, or a folder with content and not allowed."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --out needs a folder")
    files = path.iterdir() if path.is_dir() else ()
    if not allowed and any(not file.name.startswith(OWN_FILES) for file in files):
        raise UsageError(f"{path} is not empty; choose another --out, or {flags}")
