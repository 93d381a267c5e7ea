"""What of a run in stages is done, and from where each stage starts."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fastsam.distributed import World
from fastsam.files import locked
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.differences import changes, differences
from fastsam.longtail.errors import CheckpointError, DamagedError, UsageError
from fastsam.longtail.stage_plan import PlannedStage
from fastsam.longtail.start import Start
from fastsam.longtail.training.resume import newest_outline
from fastsam.longtail.training.run_folder import RunFolder
from fastsam.longtail.training.stage_record import StageRecord
from fastsam.longtail.training.trainer import Trainer


class StagedRun:
    """A run in stages: what of it is done, and from where a stage starts.

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
        stored: StageRecord | None,
        resume: bool,
        world: World,
    ) -> None:
        self.plan = plan
        self.out = out
        self._record = record
        self._stored = stored
        self._resume = resume
        self._world = world
        self._done: dict[int, Checkpoint] = {}
        self._check_begun()
        self.first = self._first_unfinished()

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        plan: tuple[PlannedStage, ...],
        *,
        sources: dict[str, str],
        out: Path | None,
        from_stage: str | Path | None,
        keep: Collection[int],
        resume: bool | Literal["auto"],
        overwrite: bool,
        world: World,
    ) -> StagedRun:
        """Find out what of a run is done.

        Raises:
            CheckpointError: if there is nothing to resume, the first stage is another run, or a stage began
                with other settings.
            UsageError: if ``overwrite`` would remove the first stage, or options exclude each other.
        """
        given = None if from_stage is None else Path(from_stage).resolve()
        if given is not None and len(plan) == 1:
            raise UsageError(
                f"--from-stage requires a list of several stages, but stages is {config.stages}; pass for "
                "instance --stages crt"
            )
        if out is not None and overwrite:
            RunFolder(out).check_origins({"--init": config.init, "--from-stage": from_stage})
        if out is None and config.parallel == "fsdp2" and world.world_size > 1 and len(plan) > 1:
            raise UsageError("stages of a sharded network are passed on in files; pass --out DIR")
        origin = None if given is None else str(given)
        stored = StageRecord.read(out) if out is not None and resume else None
        if stored is not None:
            if origin not in (None, stored.from_stage):
                raise CheckpointError(
                    f"cannot resume {out}: its first stage is {stored.from_stage or 'its own'}, not "
                    f"{origin}; omit --from-stage or choose another --out"
                )
            origin = stored.from_stage
        if keep and origin is not None:
            raise UsageError(
                f"--keep keeps epochs of the first stage, but --from-stage {origin} is trained already; omit "
                "--keep"
            )
        kept = tuple(sorted(keep)) or (() if stored is None else stored.keep)
        record = StageRecord.of(config, sources, from_stage=origin, keep=kept)
        run = cls(record, plan, out, stored, bool(resume), world)
        if resume is True and stored is None and not any(map(run.begun, range(len(plan)))):
            Checkpoint.load(out or ".")  # raises: there is none
        run._check_kept(keep)
        return run

    @property
    def keep(self) -> tuple[int, ...]:
        """Epochs of the first stage whose checkpoint is kept."""
        return self._record.keep

    def folder(self, place: int) -> Path | None:
        """Return the folder of a stage; None if nothing is written."""
        return None if self.out is None else self.plan[place].path(self.out)

    def begun(self, place: int) -> bool:
        """Return whether there is a checkpoint of a stage to continue from."""
        folder = self.folder(place)
        return self._resume and folder is not None and bool(RunFolder(folder).checkpoints())

    def is_given(self, place: int) -> bool:
        """Return whether a stage is a run that was trained before."""
        return place == 0 and self._record.from_stage is not None

    def start(self, place: int) -> tuple[Start | None, Checkpoint | None]:
        """Return the weights from which a stage starts, and their checkpoint; None if it has begun already.

        Raises:
            CheckpointError: if the earlier stage is not there.
            UsageError: if the run that is the first stage has other settings.
        """
        origin = self.plan[place].start
        if origin is None or self.begun(place):
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
            RunFolder(self.out).prepare(overwrite=overwrite)
            if self._stored is None or self._record.differs(self._stored):
                self._record.write(self.out, processes=self._world.world_size)

    def finished(self, place: int, trainer: Trainer) -> None:
        """Remember the weights of a stage that was trained. All ranks must call this together."""
        if self.out is None:
            self._done[place] = trainer.state.checkpoint()
        self._world.barrier()  # rank 0 has written the checkpoint that the others read

    def _first_unfinished(self) -> int:
        for place in reversed(range(len(self.plan))):
            if not self.begun(place):
                continue
            last = place == len(self.plan) - 1
            folder = RunFolder(self.plan[place].path(self.out or "."))
            return place + 1 if folder.result.is_file() and not last else place
        return int(self.is_given(0))

    def _check_begun(self) -> None:
        """Check that the stages that have begun are those of the plan, with the same settings and starts."""
        if self.out is None or not self._resume:
            return
        if self._stored is not None and self._record.changes_first(self._stored):
            raise CheckpointError(
                f"cannot resume {self.out}: the first stage in the list has other settings than before; use "
                "the same list, or choose another --out"
            )
        for path in RunFolder(self.out).earlier_stages() if self._stored is not None else ():
            if (
                path not in map(self.folder, range(len(self.plan)))
                and RunFolder(path).checkpoints()
            ):
                raise CheckpointError(
                    f"cannot resume {self.out}: its stage in {path} is not in the list; use the same list, "
                    "or choose another --out"
                )
        for stage in self.plan:
            begun = None
            folder = stage.path(self.out)
            with suppress(DamagedError):  # raised when it is needed
                begun = newest_outline(RunFolder(folder))
            if begun is None:
                continue
            _check_same(begun.config.as_dict(), stage, folder, same=bool(begun.contents))
            stored = (begun.start or {}).get("config")
            if stored is not None and stage.start is not None:
                _check_same(stored, self.plan[stage.start], folder, same=True)

    def _check_kept(self, keep: Collection[int]) -> None:
        """Check that the first stage, if it is finished, has the checkpoints that are to be kept."""
        folder = self.folder(0)
        if self.first == 0 or folder is None:
            return
        for epoch in sorted(keep):
            if not RunFolder(folder).kept(epoch).is_file():
                raise CheckpointError(
                    f"{folder} is finished but has no checkpoint of epoch {epoch}, which --keep requires; "
                    "choose another --out to train again"
                )

    def _finished_stage(self, place: int) -> Checkpoint:
        if place not in self._done:
            given = self._record.from_stage if place == 0 else None
            if given is not None:
                self._done[place] = _given(Path(given), self.plan[place].config)
            else:
                self._done[place] = Checkpoint.load(self.folder(place) or ".")
        return self._done[place]


def _given(run: Path, config: TrainConfig) -> Checkpoint:
    """Load the run that is the first stage.

    Args:
        run: its folder.
        config: settings of the first stage.
    """
    checkpoint = Checkpoint.load(run)
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


def _check_same(stored: dict[str, Any], stage: PlannedStage, folder: Path, *, same: bool) -> None:
    """Raise :class:`CheckpointError` if a stage was trained with other settings than the planned ones.

    Args:
        stored: settings with which it was trained.
        stage: the planned stage.
        folder: folder in which the settings were found.
        same: whether the contents of the data are compared elsewhere.
    """
    changed = changes(stored, stage.config.as_dict(), same_content=same)
    if changed:
        raise CheckpointError(
            f"cannot continue from stage {stage.name} in {folder}: {changed}. Use the same settings, or "
            "choose another --out"
        )
