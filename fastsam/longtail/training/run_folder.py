"""The output folder of a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastsam.csv_text import csv_line
from fastsam.files import OWN_FILES, check_room, locked, remove_orphans, write_text
from fastsam.longtail.errors import ChangedRunError, UsageError
from fastsam.longtail.results import Epoch, Result
from fastsam.longtail.sharded_archive import MANIFEST, is_complete
from fastsam.rank_errors import ERROR_FILE

RUN_FILES = (
    *("checkpoint.pt", "epoch-*.pt", "result.json", "history.csv", "per_class.csv", "run.yaml"),
    *("calibration.json", "*.calibration.json", ERROR_FILE.format("*"), "stages.json"),
)
"""Names of the files in a run's folder, with wildcards."""
PLAN_FILE = "sweep.json"
"""Name of the file in the folder of a sweep that stores the plan."""
TUNING_FILE = "tuning.json"
"""Name of the file in the folder of a tuning with the scores of all trials, and the chosen one."""
PROFILE = "profile"
"""Name of the folder of a profile in a run's folder."""
_RESUME = "resume"
_STOPPED = OWN_FILES + "stopped"
_POINT = re.compile(r"epoch-(\d+)(?:-step-(\d+))?(?:\.pt)?")


class RunFolder:
    """The output folder of a run.

    Attributes:
        checkpoint: path of the newest checkpoint after a whole epoch.
        resume: path of a folder with the newest checkpoints, from which only training continues. They are
            ``epoch-E.pt`` after E epochs, and ``epoch-E-step-S.pt`` after S more steps; the latter are
            folders if the network is sharded. A finished run has none.
        stopped: path of an empty file while the run waits to be continued after a signal.
        result: path of the :class:`Result` as JSON.
        history: path of a CSV file with one line per epoch.
        per_class: path of a CSV file with one line per class.
        settings: path of the settings, from which the run can be repeated; see
            :mod:`fastsam.longtail.run_file`.
        stages: path of the record of a run in several stages. Its earlier stages are the runs in the folders
            ``stage-1``, ``stage-2``, ...
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.pt"
        self.result = self.path / "result.json"
        self.history = self.path / "history.csv"
        self.per_class = self.path / "per_class.csv"
        self.settings = self.path / "run.yaml"
        self.stages = self.path / "stages.json"
        self.resume = self.path / _RESUME
        self.stopped = self.path / _STOPPED

    def kept(self, epoch: int) -> Path:
        """Return the path of the kept checkpoint of an epoch."""
        return self.path / f"epoch-{epoch}.pt"

    def point(self, epoch: int, step: int = 0, *, sharded: bool = False) -> Path:
        """Return the path of a checkpoint for resuming.

        Args:
            epoch: completed epochs.
            step: batches of the next epoch.
            sharded: whether it is the folder of a sharded network.
        """
        name = f"epoch-{epoch}" + (f"-step-{step}" if step else "")
        return self.resume / (name if sharded else f"{name}.pt")

    def points(self) -> list[Path]:
        """Return the complete checkpoints for resuming, newest first."""
        found = {}
        for path in self.resume.glob("epoch-*"):
            place = _POINT.fullmatch(path.name)
            if place is not None and (path.is_file() or is_complete(path)):
                found[path] = int(place[1]), int(place[2] or 0)
        return sorted(found, key=found.__getitem__, reverse=True)

    def checkpoints(self) -> list[Path]:
        """Return the existing checkpoints, newest first: those for resuming, ``checkpoint``, the kept ones.

        A killed run may have kept checkpoints but no ``checkpoint`` yet.
        """
        return [*self.points(), *self.epoch_checkpoints()]

    def epoch_checkpoints(self) -> list[Path]:
        """Return ``checkpoint`` and the kept checkpoints, newest first, of those that exist."""
        newest = [self.checkpoint] if self.checkpoint.is_file() else []
        return [*newest, *map(self.kept, self.kept_epochs())]

    def kept_epochs(self) -> list[int]:
        """Return the epochs of which a kept checkpoint exists, newest first."""
        stems = [path.stem.removeprefix("epoch-") for path in self.path.glob("epoch-*.pt")]
        epochs = sorted((int(stem) for stem in stems if stem.isdecimal()), reverse=True)
        return [epoch for epoch in epochs if self.kept(epoch).is_file()]

    def prune(self, newest: str | Path, count: int) -> None:
        """Remove checkpoints for resuming, and incomplete ones.

        Later ones than ``newest`` are removed, too: they are damaged, or a kept epoch before them was
        missing, so the run continued from an earlier one.

        Args:
            newest: the checkpoint that was written last.
            count: how many to keep.
        """
        points = self.points()
        kept = points[points.index(Path(newest)) :][:count]
        for path in self.resume.glob("epoch-*"):
            if path not in kept:
                with suppress(OSError):  # another process may read it; the next call tries again
                    _remove(path)

    def stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Return a value that changes when a process writes a checkpoint or a result."""
        return tuple(_stamp(path) for path in (self.checkpoint, self.result, *self.points()))

    @contextmanager
    def held(self, stamp: object) -> Iterator[None]:
        """Lock the folder against other processes; see :func:`fastsam.files.locked`.

        Args:
            stamp: value of :meth:`stamp` when the run was set up.

        Raises:
            FolderBusyError: if another process has locked the folder.
            ChangedRunError: if another process has written to it since then.
        """
        with locked(self.path):
            if self.stamp() != stamp:
                raise ChangedRunError(
                    f"another process wrote to {self.path} after this run was set up; start the run again"
                )
            remove_orphans(self.resume)
            yield

    def check(self, *, resume: bool = False, overwrite: bool = False, writes: bool = True) -> None:
        """Check that the folder can be used, and that no other process uses it.

        Args:
            resume: whether the run in the folder is resumed.
            overwrite: whether the files of a previous run are removed.
            writes: whether this process writes to the folder.

        Raises:
            UsageError: if the folder is not empty and neither ``resume`` nor ``overwrite`` is set, or both
                are, or the folder is that of a sweep.
            FolderBusyError: if another process writes to it.
        """
        if resume and overwrite:
            raise UsageError("--resume cannot be combined with --overwrite; pass one of them")
        for name in (PLAN_FILE, TUNING_FILE):
            if (self.path / name).is_file():
                raise UsageError(
                    f"--out {self.path} is the folder of a sweep, because it contains {name}; choose another "
                    "--out for a single run"
                )
        check_free(self.path, allowed=resume or overwrite, flags="--resume or --overwrite")
        if writes and self.path.is_dir():
            with locked(self.path):
                pass

    def check_origins(self, origins: Mapping[str, str | Path | None]) -> None:
        """Check that replacing the run in the folder does not remove what the new run starts from.

        Args:
            origins: files or folders of other runs, by the option that names them; None is skipped.

        Raises:
            UsageError: if one is in this folder.
        """
        for option, path in origins.items():
            if path is not None and Path(path).resolve().is_relative_to(self.path.resolve()):
                raise UsageError(
                    f"{option} {path} is in --out {self.path}, whose run --overwrite replaces; choose "
                    "another --out"
                )

    def check_room(
        self, size: int, keep: Collection[int], last: int, *, overwrite: bool = False
    ) -> None:
        """Check that the disk has space for the checkpoints of a run.

        Args:
            size: size of a checkpoint in bytes.
            keep: epochs whose checkpoints are kept.
            last: how many checkpoints for resuming are kept.
            overwrite: whether :meth:`prepare` is going to remove the files of a previous run.

        Raises:
            OSError: if the folder cannot be written to, or has too little space.
        """
        needed = size * self.coming_checkpoints(keep, last)
        if overwrite:
            files = [file for path in self._replaced() for file in _files(path)]
            sizes = {_stamp(file): file.stat().st_size for file in files}  # links count once
            needed = size * (last + 2 + len(keep)) - sum(sizes.values())
        whole, rest = divmod(max(0, needed), size)
        check_room(self.path, *[size] * whole, rest)

    def prepare(self, *, overwrite: bool = False) -> None:
        """Create the folder.

        The file of settings stays until a run replaces it, because it may be the ``--config`` file of the
        command.

        Args:
            overwrite: remove the files of a previous run and its earlier stages, its calibrations, and its
                spectra in the folder or in the subfolder ``spectra``.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self.path.glob(ERROR_FILE.format("*")):
            file.unlink(missing_ok=True)
        self.stopped.unlink(missing_ok=True)
        if overwrite:
            earlier = (
                self.earlier_stages() if self.stages.is_file() else []
            )  # else they are the user's
            for path in self._replaced():
                _remove(path)
            for stage in map(RunFolder, earlier):
                with suppress(OSError):  # it has other files, too
                    stage.prepare(overwrite=True)
                    stage.settings.unlink(missing_ok=True)
                    stage.path.rmdir()

    def _replaced(self) -> list[Path]:
        """Return the files and folders that a new run replaces, without settings and earlier stages."""
        patterns = (
            *("epoch-*.pt", "calibration.json", "epoch-*.calibration.json", "tensorboard/events.*"),
            *("class-*.json", "spectra.svg", "spectra/class-*.json", "spectra/spectra.svg"),
        )
        found = [file for pattern in patterns for file in self.path.glob(pattern)]
        tables = (self.history, self.per_class, self.stages)
        return [self.resume, self.checkpoint, self.result, *tables, *found]

    def earlier_stages(self) -> list[Path]:
        """Return the existing folders with names of earlier stages."""
        return [
            path
            for path in self.path.glob("stage-*")
            if path.name[6:].isdecimal() and path.is_dir()
        ]

    def coming_checkpoints(self, keep: Collection[int], last: int) -> int:
        """Return the number of checkpoint files for which a run needs additional disk space.

        Args:
            keep: epochs whose checkpoints are kept.
            last: how many checkpoints for resuming are kept.
        """
        missing = sum(not self.kept(epoch).is_file() for epoch in keep)
        # Two more: one is written before the oldest is removed, and ``checkpoint`` may be older than all.
        return last + 2 - min(len(self.points()), last) - self.checkpoint.is_file() + missing

    def write_settings(self, text: str, *, replace: bool = False) -> None:
        """Write the file of settings, unless it exists.

        Args:
            text: its content.
            replace: replace the file of another run. That of a run in stages belongs to its record.
        """
        if not self.settings.is_file() or (replace and not self.stages.is_file()):
            write_text(self.settings, text)

    def write(self, result: Result) -> None:
        """Write the result as JSON and as two CSV tables, each atomically; remove the folder ``resume``."""
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
        _remove(self.resume)

    def write_history(self, history: Sequence[Epoch]) -> None:
        """Write the epochs so far as a CSV table, atomically."""
        names = list(Epoch.__dataclass_fields__)
        rows = [[getattr(epoch, name) for name in names] for epoch in history]
        write_text(self.history, "".join(map(csv_line, (names, *rows))))


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists; first its manifest, so that it never looks complete."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    """Return a file, or all files in a folder; none if it does not exist."""
    return [file for file in (path, *path.rglob("*")) if file.is_file()]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_free(path: str | Path, *, allowed: bool, flags: str) -> None:
    """Check that an output folder is empty or does not exist.

    Args:
        path: the folder.
        allowed: whether it may have content.
        flags: options that allow content, for the message.

    Raises:
        UsageError: if ``path`` is a file, or a folder with content that is not allowed.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file; pass a folder")
    files = path.iterdir() if path.is_dir() else ()
    # What a run leaves that failed before its first checkpoint does not hinder the next try.
    left = (OWN_FILES, ERROR_FILE.partition("{")[0], PROFILE)
    if not allowed and any(not file.name.startswith(left) for file in files):
        raise UsageError(f"{path} is not empty; choose another --out or pass {flags}")
