"""One run of a plan: its stored result, or the training that leads to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from fastsam.distributed import World
from fastsam.files import FolderBusyError, locked
from fastsam.longtail.archive import check_archive
from fastsam.longtail.build import load_configured
from fastsam.longtail.data import LongTailData
from fastsam.longtail.differences import changes, is_own
from fastsam.longtail.errors import CheckpointError, DamagedError, DataError
from fastsam.longtail.results import Result
from fastsam.longtail.stage_plan import last_config, plan_stages
from fastsam.longtail.sweeps.plan import PlannedRun, changed_settings
from fastsam.longtail.training import RunFolder, fit_stages
from fastsam.longtail.training.resume import newest_outline
from fastsam.stopping import StopRequest
from fastsam.text import notice

Load = Callable[[], LongTailData]
"""A function that returns the data set of a run."""


def stored_result(
    run: PlannedRun,
    out: str | Path,
    *,
    load: Load | None = None,
    world: World = World(),  # noqa: B008 (frozen)
    quiet: bool = False,
) -> Result | None:
    """Return the result of a planned run if the run is finished, else None.

    Checkpoints that the run needs are renamed if they are damaged.

    Args:
        run: the run.
        out: folder of the sweep.
        load: returns the data set. It is called only for the user's own data in another folder.
        world: the ranks that train the run together.
        quiet: say nothing about a damaged result.

    Raises:
        CheckpointError: if the folder of the run contains a run with other settings.
    """
    folder = RunFolder(Path(out) / run.name)
    _set_aside_damaged(folder, _needed(run, folder), world)
    if not folder.result.is_file():
        return None
    try:
        result = Result.load(folder.result)
    except DataError as error:
        if not quiet:
            notice(f"{error}; creating it again")
        return None
    config = last_config(run.config)
    moved = is_own(config.data) and result.config.get("data_root") != config.data_root
    same = moved and bool(result.contents) and result.contents == _loader(run, load)().contents()
    changed = changed_settings(result.config, config, same_content=same)
    if changed:
        raise CheckpointError(
            f"{folder.path} contains a run with other settings: {changed}. Choose another --out"
        )
    return result if all(path.is_file() for path in _needed(run, folder)) else None


def complete(
    run: PlannedRun,
    out: str | Path,
    *,
    load: Load | None = None,
    world: World = World(),  # noqa: B008 (frozen)
    stop: StopRequest | None = None,
    progress: bool = True,
    quiet: bool = False,
) -> Result:
    """Return the result of a planned run: load it, or train the run from where it stopped.

    Damaged checkpoints are renamed and created again.

    Args:
        run: the run.
        out: folder of the sweep.
        load: returns the data set; None to load that of the settings.
        world: the ranks that train the run together.
        stop: request to stop by a signal; the run then saves before it raises
            :class:`fastsam.stopping.Stopped`.
        progress: show progress.
        quiet: say nothing about a damaged result.

    Raises:
        CheckpointError: if the folder of the run contains a run with other settings.
        FolderBusyError: if another process trains the run.
    """
    folder = RunFolder(Path(out) / run.name)
    result = stored_result(run, out, load=load, world=world, quiet=quiet)
    if result is not None:
        return result
    for stage in plan_stages(run.config):
        own = RunFolder(stage.path(folder.path))
        _set_aside_damaged(own, own.checkpoints(), world)
    return fit_stages(
        run.config,
        data=_loader(run, load)(),
        sources=dict(run.sources),
        out=folder.path,
        resume="auto",
        keep=run.keep,
        world=world,
        stop=stop,
        progress=progress,
    )


def check_unfinished(runs: Iterable[PlannedRun], out: str | Path) -> None:
    """Check that unfinished runs can be resumed with the settings of the plan.

    The number of threads counts here, unlike for a finished run: with another one, the rest of a run would be
    rounded differently from its begin.

    Args:
        runs: the planned runs; those that are finished, have no readable checkpoint or are
            trained by another process are ignored.
        out: folder of the sweep.

    Raises:
        CheckpointError: if a run began with other settings.
    """
    changed = {}
    for run in runs:
        folder = RunFolder(Path(out) / run.name)
        files = [folder.result, *_needed(run, folder)]
        if all(file.is_file() for file in files) or busy_reason(run, Path(out)) is not None:
            continue
        for stage in plan_stages(run.config):
            begun = None
            with suppress(DamagedError):  # it is trained again
                begun = newest_outline(RunFolder(stage.path(folder.path)))
            if begun is not None:
                stored, same = begun.config.as_dict(), bool(begun.contents)
                name = str(Path(run.name) / stage.folder)
                changed[name] = changes(stored, stage.config.as_dict(), same_content=same)
    found = [f"{name}: {text}" for name, text in changed.items() if text]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"unfinished runs in {out} began with other settings ({'; '.join(found[:3])}{more}). Use the "
            "same settings to finish them, or choose another --out"
        )


def busy_reason(run: PlannedRun, out: Path) -> str | None:
    """Return which process trains a planned run at this moment, as a sentence; None if there is none."""
    folder = out / run.name
    if not folder.is_dir():
        return None
    try:
        with locked(folder):
            return None
    except FolderBusyError as error:
        return str(error)


def _needed(run: PlannedRun, folder: RunFolder) -> list[Path]:
    """Return the checkpoints that a run needs. Kept ones are those of its first stage."""
    kept = plan_stages(run.config)[0].path(folder.path) if run.needs else folder.path
    last = folder.checkpoint.name
    return [(folder.path if name == last else kept) / name for name in run.needs]


def _loader(run: PlannedRun, load: Load | None) -> Load:
    return load or (lambda: load_configured(run.config, progress=False))


def _set_aside_damaged(folder: RunFolder, paths: Iterable[Path], world: World) -> None:
    """Rename damaged checkpoints on rank 0, so that they are created again. All ranks wait for it.

    If another process trains the run, its files stay as they are.
    """
    for path in paths if world.rank == 0 else ():
        if _damage(path) is None:
            continue
        with suppress(FolderBusyError), locked(folder.path):
            error = _damage(path)  # again, because another process may have replaced the file
            if error is not None:
                aside = path.with_name(f"{path.name}.damaged")
                path.replace(aside)
                notice(f"{error}; renamed to {aside.name}, creating it again")
    world.barrier()


def _damage(path: Path) -> DamagedError | None:
    """Return what is wrong with a checkpoint file; None if it is sound or does not exist."""
    try:
        if path.is_file():
            check_archive(path)
    except DamagedError as error:
        return error if path.exists() else None
    return None
