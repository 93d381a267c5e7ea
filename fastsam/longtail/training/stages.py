"""Trains the stages of a run, each from the weights of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastsam.distributed import World
from fastsam.files import locked
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import UsageError
from fastsam.longtail.results import Result
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.stage_plan import PlannedStage, plan_stages
from fastsam.longtail.start import Start
from fastsam.longtail.training.run_data import given_or_loaded
from fastsam.longtail.training.run_folder import RunFolder
from fastsam.longtail.training.stage_checks import check_later, check_settings, check_start
from fastsam.longtail.training.staged_run import StagedRun
from fastsam.longtail.training.trainer import Trainer
from fastsam.stopping import Stopped, StopRequest


@dataclass(frozen=True, eq=False)
class StageTrainer:
    """A stage that is about to be trained.

    Attributes:
        stage: the stage.
        trainer: its trainer. Call :meth:`fit` before the next one is asked for.
        folder: folder of the stage; None if nothing is written.
        last: whether its result is that of the run.
        out: folder of the run; None if nothing is written.
    """

    stage: PlannedStage
    trainer: Trainer
    folder: str | Path | None
    last: bool
    out: str | Path | None = None

    def fit(self) -> Result:
        """Train the stage and return its result; see :meth:`Trainer.fit`."""
        try:
            return self.trainer.fit()
        except Stopped:
            folder = self.trainer.folder
            if folder is not None and folder.stopped.is_file():
                _mark_stopped(self.out, self.trainer.world)
            raise


def fit_stages(
    config: TrainConfig,
    *,
    on_stage: Callable[[StageTrainer], None] | None = None,
    **options: Any,
) -> Result:
    """Train all stages of a run, and return the result of the last one.

    A run without stages is trained as by :class:`Trainer`. With ``out``, the last stage is written to this
    folder, and earlier ones to its subfolders ``stage-1``, ``stage-2``, ... With ``resume``, finished stages
    are skipped, and a stage that was interrupted is continued.

    Args:
        config: settings of the run, for instance from ``recipe(..., stages="crt")``.
        on_stage: called before each stage is trained.
        **options: arguments of :func:`stage_trainers`.

    Raises:
        UsageError: also if a setting of a stage is not valid or does not fit its network or the data set,
            before anything is trained.
        CheckpointError: also if ``from_stage`` is not finished or has other settings.

    Example:
        >>> from fastsam.longtail import recipe
        >>> one_epoch = {"epochs": 1, "stage_set": ("classifier.epochs=1",)}
        >>> config = recipe("digits-lt", "ce", "sgd", stages="crt", **one_epoch).config()
        >>> result = fit_stages(config, progress=False)
        >>> [stage["name"] for stage in result.earlier_stages], result.config["method"]
        (['representation'], 'ce-rs')
    """
    result: Result | None = None
    with closing(stage_trainers(config, **options)) as stages:
        for one in stages:
            if on_stage is not None:
                on_stage(one)
            result = one.fit()
    if result is None:
        raise AssertionError("the last stage is always trained or evaluated")
    return result


def stage_trainers(
    config: TrainConfig,
    *,
    sources: dict[str, str] | None = None,
    data: LongTailData | None = None,
    out: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    from_stage: str | Path | None = None,
    keep: Collection[int] = (),
    profile: str | Path | None = None,
    world: World = World(),  # noqa: B008 (frozen)
    stop: StopRequest | None = None,
    start: Start | None = None,
    **options: Any,
) -> Generator[StageTrainer, None, None]:
    """Yield a trainer for each stage that is not finished; see :func:`fit_stages`.

    The folder of the run is locked until the last stage begins, which locks it again.

    Args:
        config: settings of the run.
        sources: source of each setting by name, for the results.
        data: the data set; None to load the data set of ``config``.
        out: folder of the run; None to write nothing.
        resume: continue the run in ``out``; ``"auto"`` begins one if there is none.
        overwrite: replace the run in ``out``.
        from_stage: folder of a finished run that is the first stage. It must have the same settings.
        keep: epochs of the first stage whose checkpoint is kept. If there are none, a resumed run in
            stages keeps those of its record.
        profile: folder for the profile of the first stage that is trained.
        world: the ranks of the run.
        stop: request to stop by a signal.
        start: weights from which the first stage starts, instead of those that the settings name.
        **options: other arguments of :class:`Trainer`; only a run without stages takes ``branch``.
    """
    common = {**options, "world": world, "stop": stop}
    folder = None if out is None else Path(out)
    plan = plan_stages(config, sources)
    if config.stages == "none":
        if from_stage is not None:
            raise UsageError(
                "--from-stage requires a list of several stages, but stages is none; pass for instance "
                "--stages crt"
            )
        trainer = Trainer(
            config,
            sources=sources,
            data=data,
            out=out,
            resume=resume,
            overwrite=overwrite,
            start=start,
            keep=keep,
            profile=profile,
            **common,
        )
        yield StageTrainer(plan[0], trainer, folder, last=True, out=folder)
        return
    if options.get("branch") is not None:
        raise UsageError("a branch continues one stage; pass stages=none with branch")
    run = StagedRun.of(
        config,
        plan,
        sources=sources or {},
        out=folder,
        from_stage=from_stage,
        keep=keep,
        resume=resume,
        overwrite=overwrite,
        world=world,
    )
    if folder is not None:
        RunFolder(folder).check(resume=bool(resume), overwrite=overwrite, writes=world.rank == 0)
    first = run.first
    if first == 0 and start is None and not run.begun(0):
        check_start(config)
    check_settings(plan[first:], world)
    device = chosen_device(world.device(config.device))
    shown = options.get("progress", True) and world.rank == 0
    data = given_or_loaded(plan[first].config, data, world, progress=shown)
    check_later(plan[first + 1 :], data, world, device, module=options.get("model"))
    for place in range(first, len(plan)):
        last = place == len(plan) - 1
        fresh = place == first and not resume
        with ExitStack() as held:
            if folder is not None and not last and world.rank == 0:
                held.enter_context(locked(folder))
            begin, before = run.start(place)
            if before is not None:
                before.check_data(data)  # before the folder is changed
            trainer = Trainer(
                plan[place].config,
                sources=dict(plan[place].sources),
                data=data,
                out=run.folder(place),
                # Later, the folder of the run is not empty: it has those of other stages.
                resume=False if fresh else "auto",
                overwrite=overwrite and fresh,
                start=start if place == 0 else begin,
                keep=run.keep if place == 0 else (),
                profile=profile if place == first else None,
                planned=True,
                **common,
            )
            data = trainer.data
            if place == first:
                run.begin(overwrite=overwrite and not last)
            yield StageTrainer(plan[place], trainer, run.folder(place), last, folder)
            run.finished(place, trainer)
        # A signal may have reached only some of the ranks.
        signals = [] if last else world.all_gather(None if stop is None else stop.signal)
        if any(signals):
            _mark_stopped(folder, world)
            name = signals[world.rank] or "a signal to another process"
            saved = "to continue, run the same command with --resume auto"
            raise Stopped(
                f"stopped by {name} after stage {plan[place].name}; "
                + (saved if folder else "nothing was saved without --out")
            )


def _mark_stopped(out: str | Path | None, world: World) -> None:
    """Mark the folder of a run as waiting to be continued."""
    if out is not None and world.rank == 0:
        RunFolder(Path(out)).stopped.touch()
