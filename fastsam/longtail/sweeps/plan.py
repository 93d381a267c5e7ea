"""The plan of a sweep: its runs, by the names of their folders, and the file that stores them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsam import files
from fastsam.files import FolderBusyError, locked, write_text
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.differences import changes
from fastsam.longtail.errors import CheckpointError, DataError, UsageError
from fastsam.longtail.recipes import Recipe
from fastsam.longtail.stage_plan import plan_stages
from fastsam.longtail.training import RunFolder
from fastsam.longtail.training.run_folder import PLAN_FILE
from fastsam.longtail.training.stage_checks import check_start
from fastsam.records import build

FORMAT = 1
_LONGEST_NAME = 200
_BUSY_SECONDS = 30.0
"""Longest time to wait for another process that stores its plan."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be trained.

    Attributes:
        name: folder of the run below the folder of the sweep, for instance ``optimizer=sam,rho=0.1/seed-0``.
        config: settings of the run.
        sources: source of each setting, by name.
        keep: epochs whose checkpoint is kept.
        needs: names of checkpoints without which the run is not finished. In a run in stages, the kept ones
            are those of the first stage.
    """

    name: str
    config: TrainConfig
    sources: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, name: str, chosen: Recipe, *, keep: tuple[int, ...] = (), needs: tuple[str, ...] = ()
    ) -> PlannedRun:
        """Plan the run of a recipe.

        Raises:
            UsageError: if a setting is not valid, also one of a later stage, or start weights are missing.
        """
        group = _group(name)
        try:
            config = chosen.config()
            plan_stages(config)
            check_start(config)
        except UsageError as error:
            raise UsageError(f"{error} (run {group})" if group else str(error)) from error
        return cls(name, config, chosen.sources, keep, needs)

    @property
    def group(self) -> str:
        """The name without the seed: runs of one group differ only in it."""
        return _group(self.name)

    def as_dict(self) -> dict[str, Any]:
        """Convert to values that JSON accepts; the name is not included."""
        return {
            "settings": self.config.as_dict(),
            "sources": dict(self.sources),
            "keep": list(self.keep),
            "needs": list(self.needs),
        }

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> PlannedRun:
        """Create a planned run from its name and the result of :meth:`as_dict`.

        Raises:
            ValueError: if a value is missing or has a wrong type, or the settings are not valid.
        """
        values = dict(values)
        config = TrainConfig.from_dict(values.pop("settings", None))
        return build(cls, {"name": name, **values}, config=config)


def _group(name: str) -> str:
    return name.rpartition("/")[0]


@dataclass(frozen=True)
class Shard:
    """A part of a plan, for one of several machines: every ``count``-th run.

    Attributes:
        index: number of the part, from 1 to ``count``.
        count: number of parts.

    Raises:
        UsageError: if the index is not between 1 and the count.
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(
                f"shard must be I/N with I from 1 to N, got {self.index}/{self.count}; the parts of four "
                "are 1/4, 2/4, 3/4 and 4/4"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse ``I/N``.

        Raises:
            UsageError: if the text has another form.

        Example:
            >>> Shard.parse("2/4").of(["a", "b", "c", "d", "e", "f"])
            ['b', 'f']
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and len(text) < 20):
            raise UsageError(
                f"shard must be I/N, such as 1/4 for the first of four, got {text!r:.60}"
            )
        return cls(int(index), int(count))

    def of(self, runs: Sequence[Any]) -> list[Any]:
        """Return the runs of this part."""
        return list(runs[self.index - 1 :: self.count])


def check_plan(runs: Iterable[PlannedRun], out: str | Path) -> None:
    """Check that every run of a plan has a folder of its own.

    Raises:
        UsageError: if there is no run, a name is too long for a folder, two runs have the same name, or
            ``out`` is the folder of a single run.
    """
    if RunFolder(out).checkpoints():
        raise UsageError(f"--out {out} is the folder of a run; choose another --out")
    seen: set[str] = set()
    for run in runs:
        longest = max(map(len, run.name.split("/")))
        if longest > _LONGEST_NAME:
            raise UsageError(
                f"the folder {run.name!r:.80} would have a name of {longest} characters, at most "
                f"{_LONGEST_NAME} are possible; vary fewer settings"
            )
        if run.name in seen:
            raise UsageError(
                f"the plan has two runs with the name {run.name!r:.80}; give each value once"
            )
        seen.add(run.name)
    if not seen:
        raise UsageError(
            "the plan has no runs; pass at least one value of each setting, and --seeds 1"
        )


def changed_settings(
    stored: Mapping[str, Any], config: TrainConfig, *, same_content: bool = False
) -> str:
    """Describe the settings in which a stored run differs from a planned one; empty if it does not.

    The number of threads does not count: finished runs are used on any machine.

    Args:
        stored: settings as returned by :meth:`TrainConfig.as_dict`.
        config: settings of the planned run.
        same_content: see :func:`fastsam.longtail.differences.differences`.
    """
    wanted = config.as_dict()
    return changes(stored, wanted, same_content=same_content, but_for=["threads"])


def check_stored_settings(
    stored: Mapping[str, Mapping[str, Any]], runs: Iterable[PlannedRun], out: str | Path
) -> None:
    """Check that stored runs have the settings of the planned ones of the same names.

    Args:
        stored: the result of :func:`stored_runs`.
        runs: the planned runs.
        out: folder of the sweep, for the message.

    Raises:
        CheckpointError: if a run has other settings.
    """
    for run in runs:
        known = stored.get(run.name, {}).get("settings")
        # Whether the user's own data are the same is checked when a result is read.
        changed = changed_settings(known, run.config, same_content=True) if known else ""
        if changed:
            raise CheckpointError(
                f"{Path(out) / PLAN_FILE} has the run {run.name} with other settings: {changed}. Choose "
                "another --out"
            )


def stored_runs(out: str | Path) -> dict[str, dict[str, Any]]:
    """Read the plan that is stored in the folder of a sweep.

    Returns:
        The result of :meth:`PlannedRun.as_dict` for each run, by name; empty if no plan is stored.

    Raises:
        DataError: if the file is damaged or was edited.
    """
    path = Path(out) / PLAN_FILE
    try:
        document = files.from_json(path.read_text("utf-8"))
        runs = document.get("runs")
        if document.get("format") != FORMAT or not isinstance(runs, dict):
            raise ValueError(f"expected format {FORMAT}, got {document.get('format')!r:.20}")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(
            f"{path} is not a plan that this version of fastsam wrote: {error}. Remove it; finished runs "
            "are kept"
        ) from error
    return runs


def store_plan(out: str | Path, runs: Sequence[PlannedRun]) -> None:
    """Add runs to the plan that is stored in the folder of a sweep.

    Several commands may store plans in one folder, also at the same time, as long as runs of the same name
    have the same settings.

    Args:
        out: folder of the sweep.
        runs: the runs. Settings that only determine where a run is executed replace stored ones.

    Raises:
        UsageError: if two runs have the same name, or ``out`` is the folder of a single run.
        CheckpointError: if a stored run has the same name and other settings.
        DataError: if the stored plan is damaged.
        FolderBusyError: if another process locks the folder for a long time.
    """
    check_plan(runs, out)
    out = Path(out)
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            with locked(out):
                _extend(out, runs)
            return
        except FolderBusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _extend(out: Path, runs: Sequence[PlannedRun]) -> None:
    """Add runs to the stored plan; the caller holds the lock of the folder."""
    stored = stored_runs(out)
    check_stored_settings(stored, runs, out)
    plan = stored | {run.name: run.as_dict() for run in runs}
    if plan != stored:
        write_text(out / PLAN_FILE, files.to_json({"format": FORMAT, "runs": plan}))
