"""Trains the stages of a run, each from the weights of an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastsam.distributed import World
from fastsam.files import locked
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.results import Result
from fastsam.longtail.stage_plan import PlannedStage, plan_stages
from fastsam.longtail.start import Start
from fastsam.longtail.training.resume import readable
from fastsam.longtail.training.run_folder import RunFolder
from fastsam.longtail.training.stage_record import StageRecord
from fastsam.longtail.training.trainer import Trainer
from fastsam.stopping import Stopped, StopRequest


@dataclass(frozen=True, eq=False)
class StageTrainer:
    """A stage that is about to be trained.

    Attributes:
        stage: the stage.
        trainer: its trainer. Call its method ``fit`` before the next one is asked for.
        folder: folder of the stage; None if nothing is written.
        last: whether its result is that of the run.
    """

    stage: PlannedStage
    trainer: Trainer
    folder: Path | None
    last: bool


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
        UsageError: also if a setting of a stage is not valid, before anything is trained.
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
    for one in stage_trainers(config, **options):
        if on_stage is not None:
            on_stage(one)
        result = one.trainer.fit()
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
        keep: epochs of the first stage whose checkpoint is kept.
        profile: folder for the profile of the first stage that is trained.
        world: the ranks of the run.
        stop: request to stop by a signal.
        **options: other arguments of :class:`Trainer`; a plain run also takes ``branch`` and ``start``.
    """
    plan = plan_stages(config, sources)
    common = {**options, "world": world, "stop": stop}
    if len(plan) == 1:
        if from_stage is not None:
            raise UsageError(
                f"--from-stage requires a list of several stages, but stages is {config.stages}; pass for "
                "instance --stages crt"
            )
        folder = None if out is None else Path(out)
        trainer = Trainer(
            plan[0].config,
            sources=sources,
            data=data,
            out=out,
            resume=resume,
            overwrite=overwrite,
            keep=keep,
            profile=profile,
            **common,
        )
        yield StageTrainer(plan[0], trainer, folder, last=True)
        return
    if options.get("start") is not None or options.get("branch") is not None:
        raise UsageError("stages determine their start weights; pass stages, or start or branch")
    run = _StagedRun.of(config, plan, sources or {}, out, from_stage, resume, world)
    if run.out is not None:
        RunFolder(run.out).check(resume=bool(resume), overwrite=overwrite, writes=world.rank == 0)
    first = run.first
    for place in range(first, len(plan)):
        last = place == len(plan) - 1
        fresh = place == first and not resume
        with ExitStack() as held:
            if run.out is not None and not last and world.rank == 0:
                held.enter_context(locked(run.out))
            start, before = run.start(place)
            trainer = Trainer(
                plan[place].config,
                sources=dict(plan[place].sources),
                data=data,
                out=run.folder(place),
                # Later, the folder of the run is not empty: it has those of other stages.
                resume=False if fresh else "auto",
                overwrite=overwrite and fresh,
                start=start,
                keep=keep if place == 0 else (),
                profile=profile if place == first else None,
                **common,
            )
            data = trainer.data
            if before is not None:
                before.check_data(data)
            if place == first:
                run.begin(overwrite=overwrite and not last)
            yield StageTrainer(plan[place], trainer, run.folder(place), last)
            run.finished(place, trainer)
        if stop and not last:
            saved = "to continue, run the same command with --resume auto"
            raise Stopped(
                f"stopped by {stop.signal} after stage {plan[place].name}; "
                + (saved if run.out else "nothing was saved without --out")
            )


class _StagedRun:
    """A run in several stages: what of it is done, and from where a stage starts.

    Attributes:
        plan: its stages.
        out: its folder; None if nothing is written.
        first: place of the first stage that is not finished.
    """

    def __init__(
        self,
        record: StageRecord,
        plan: tuple[PlannedStage, ...],
        out: Path | None,
        resume: bool,
        world: World,
    ) -> None:
        self.plan = plan
        self.out = out
        self._record = record
        self._resume = resume
        self._world = world
        self._done: dict[int, Checkpoint] = {}
        if record.from_stage is not None:
            self._done[0] = self._given(Path(record.from_stage))
        self.first = self._first_unfinished()

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        plan: tuple[PlannedStage, ...],
        sources: dict[str, str],
        out: str | Path | None,
        from_stage: str | Path | None,
        resume: bool | Literal["auto"],
        world: World,
    ) -> _StagedRun:
        """Find out what of a run is done.

        Raises:
            CheckpointError: if there is nothing to resume, or its first stage is another run.
        """
        given = None if from_stage is None else str(Path(from_stage).resolve())
        stored = StageRecord.read(out) if out is not None and resume else None
        if stored is not None:
            if given not in (None, stored.from_stage):
                raise CheckpointError(
                    f"cannot resume {out}: its first stage is {stored.from_stage or 'its own'}, not {given}; "
                    "omit --from-stage or choose another --out"
                )
            given = stored.from_stage
        if out is None and config.parallel == "fsdp2" and world.world_size > 1:
            raise UsageError("stages of a sharded network are passed on in files; pass --out DIR")
        folder = None if out is None else Path(out)
        run = cls(StageRecord(config, sources, given), plan, folder, bool(resume), world)
        if resume is True and stored is None and not any(map(run._begun, range(len(plan)))):
            Checkpoint.load(folder or ".")  # raises: there is none
        return run

    def folder(self, place: int) -> Path | None:
        """Return the folder of a stage; None if nothing is written."""
        return None if self.out is None else self.plan[place].path(self.out)

    def start(self, place: int) -> tuple[Start | None, Checkpoint | None]:
        """Return the weights from which a stage starts, and their checkpoint; None if it has begun already.

        Raises:
            CheckpointError: if the earlier stage was trained with other settings.
        """
        origin = self.plan[place].start
        if origin is None or self._begun(place):
            return None, None
        before = self._finished_stage(origin)
        earlier = list((before.start or {}).get("stages", ()))
        costs = [epoch.gradients for epoch in before.history]
        own = {
            "name": self.plan[origin].name,
            "method": before.config.method,
            "optimizer": before.config.optimizer,
            "epochs": before.epoch,
            "gradients": None if None in costs else sum(cost for cost in costs if cost is not None),
            "seconds": sum(epoch.seconds for epoch in before.history),
        }
        given = self._record.from_stage if origin == 0 else None
        where = given or f"stage {self.plan[origin].name}"
        start = Start.of_checkpoint(before, where)
        record = {**start.record, "stage": self.plan[place].name, "stages": [*earlier, own]}
        return replace(start, record=record), before

    def begin(self, *, overwrite: bool) -> None:
        """Write the record of the run, unless it is there; first remove what an earlier run left.

        Args:
            overwrite: whether to remove it; the trainer of the last stage has done so.
        """
        if self.out is None or self._world.rank != 0:
            return
        with ExitStack() as held:
            if self.first == len(self.plan) - 1:
                held.enter_context(locked(self.out))
            folder = RunFolder(self.out)
            if overwrite:
                folder.prepare(overwrite=True)
            if not (self._resume and folder.stages.is_file()):
                self._record.write(self.out, processes=self._world.world_size)

    def finished(self, place: int, trainer: Trainer) -> None:
        """Remember the weights of a stage that was trained. All ranks must call this together."""
        if self.out is None:
            self._done[place] = trainer.state.checkpoint()
        self._world.barrier()  # rank 0 has written the checkpoint that the others read

    def _first_unfinished(self) -> int:
        for place in reversed(range(len(self.plan))):
            if not self._begun(place):
                continue
            self._check_origin(place)
            last = place == len(self.plan) - 1
            folder = RunFolder(self.plan[place].path(self.out or "."))
            return place + 1 if folder.result.is_file() and not last else place
        return 1 if 0 in self._done else 0

    def _begun(self, place: int) -> bool:
        """Return whether there is a checkpoint of a stage to continue from."""
        folder = self.folder(place)
        return self._resume and folder is not None and bool(RunFolder(folder).checkpoints())

    def _check_origin(self, place: int) -> None:
        """Check that a stage that has begun started from the planned one."""
        origin, folder = self.plan[place].start, self.folder(place)
        if origin is None or folder is None:
            return
        for _, checkpoint in readable(RunFolder(folder)):
            stored = (checkpoint.start or {}).get("config")
            if stored is not None:
                _check_same(stored, self.plan[origin], folder)
            return

    def _finished_stage(self, place: int) -> Checkpoint:
        if place not in self._done:
            folder = self.folder(place)
            checkpoint = Checkpoint.load(folder or ".")
            _check_same(checkpoint.config.as_dict(), self.plan[place], folder)
            self._done[place] = checkpoint
        return self._done[place]

    def _given(self, run: Path) -> Checkpoint:
        """Load the run that is the first stage."""
        checkpoint = Checkpoint.load(run)
        config = self.plan[0].config
        if checkpoint.epoch < checkpoint.config.epochs or checkpoint.unfinished is not None:
            raise CheckpointError(
                f"--from-stage {run} is not finished (epoch {checkpoint.epoch} of "
                f"{checkpoint.config.epochs}); continue it first: fastsam train --resume --out {run}"
            )
        changed = differences(
            checkpoint.config.as_dict(), config.as_dict(), same_content=bool(checkpoint.contents)
        )
        if changed:
            name = changed[0]
            raise UsageError(
                f"--from-stage {run} has {name} {getattr(checkpoint.config, name)}, but the first stage has "
                f"{getattr(config, name)}; pass the options of that run, and --stage-set for later stages"
            )
        return checkpoint


def _check_same(stored: dict[str, Any], stage: PlannedStage, folder: Path | None) -> None:
    """Raise :class:`CheckpointError` if a stage was trained with other settings than the planned ones."""
    wanted = stage.config.as_dict()
    for name in differences(stored, wanted, same_content=True):
        raise CheckpointError(
            f"cannot continue from stage {stage.name} in {folder}: {name} was {stored.get(name)}, is now "
            f"{wanted.get(name)}; use the same settings, or choose another --out"
        )
