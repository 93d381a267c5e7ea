"""The trainer: trains one configuration and evaluates it on the test set."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from fastsam.distributed import World
from fastsam.longtail.build import (
    augmented,
    build_objective,
    build_optimizer,
    build_schedules,
)
from fastsam.longtail.checkpoint import Checkpoint, checkpoint_bytes
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.errors import UsageError
from fastsam.longtail.norms import NormLimits
from fastsam.longtail.precision import check_tf32, float32_products
from fastsam.longtail.results import Epoch, Result
from fastsam.longtail.run_file import run_file_text
from fastsam.longtail.runtime import chosen_device
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.longtail.sharding import shard
from fastsam.longtail.start import Start
from fastsam.longtail.trainable import set_options
from fastsam.longtail.training.ascent_batch import AscentBatches
from fastsam.longtail.training.auto_precision import decided
from fastsam.longtail.training.average import JudgedWeights
from fastsam.longtail.training.batches import EpochBatches
from fastsam.longtail.training.beginning import begun_network
from fastsam.longtail.training.branch import Branch
from fastsam.longtail.training.checks import (
    check_accumulation,
    check_batches,
    check_run,
    check_selection,
    check_weights,
)
from fastsam.longtail.training.curvature import TrackedCurvature
from fastsam.longtail.training.engine import Engine
from fastsam.longtail.training.evaluation import Judge
from fastsam.longtail.training.profile import EVALUATION, StepProfile
from fastsam.longtail.training.resume import Resume, check_same_checkpoint
from fastsam.longtail.training.run_data import given_or_loaded
from fastsam.longtail.training.run_folder import RunFolder
from fastsam.longtail.training.run_state import RunState
from fastsam.longtail.training.saving import Saver
from fastsam.longtail.training.step import Step, Stepper
from fastsam.longtail.training.step_requests import StepRequests
from fastsam.longtail.training.totals import EpochTotals
from fastsam.longtail.training.unfinished import continue_unfinished, unfinished_state
from fastsam.progress import ProgressBar
from fastsam.stopping import Stopped, StopRequest
from fastsam.threads import cpu_threads


class Trainer:
    """Trains one configuration, and evaluates the weights after the last epoch on the test set.

    With ``select="best-validation"`` in the settings it evaluates the weights of the best epoch on the
    validation set, and the result says so. The test set is never used to select anything.

    Args:
        config: settings of the run, for instance from :func:`fastsam.longtail.recipe`.
        data: the data set; None to load the data set of ``config``.
        sources: source of each setting by name, for the result; None for those of a resumed checkpoint.
        out: output folder for checkpoint and results; None to write nothing.
        resume: resume the run in ``out``; ``"auto"`` starts a new run if there is no checkpoint.
        overwrite: replace the run in ``out``.
        branch: checkpoint of another run to continue under other settings.
        start: weights to start from in epoch 1, instead of those that ``config.init`` or
            ``config.pretrained`` name. A resumed run and a branch read none of them.
        model: your network for ``config.model = "own:NAME"``: a module that maps images
            ``[B, channels, H, W]`` to features ``[B, D]``. It is copied; the head is that of the settings.
        keep: epochs K whose checkpoint is also kept as ``out/epoch-K.pt``.
        on_step: called after every step with the :class:`Step` of each of its batches; ``on_epoch`` with the
            record of every finished epoch, ``on_result`` with the result before it is written.
        world: the ranks of the run, which split each batch; by default a single process. Loss and gradient
            are those of the whole batch, but batch normalization uses statistics of the rank's part.
        profile: folder for the profile of 20 steps, then in the attribute of this name; None for no profile.
        stop: from :func:`fastsam.stopping.stop_signals`: after a signal the run finishes its step, saves, and
            raises :class:`fastsam.stopping.Stopped`. None leaves signals as they are.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.
        planned: set by :func:`fastsam.longtail.training.stage_trainers`, which has checked the settings.

    Raises:
        UsageError, DataError: if settings are not valid, ``out`` is not empty, or data are damaged.
        CheckpointError: if the run cannot be resumed.
        FolderBusyError, OSError: if another process writes to ``out``, or it cannot be written to.

    Example:
        >>> from fastsam.longtail import Trainer, recipe
        >>> config = recipe("digits-lt", "ce", "sgd", epochs=1).config()
        >>> sorted(Trainer(config).fit().test.groups)
        ['head', 'mid', 'tail']
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        data: LongTailData | None = None,
        sources: dict[str, str] | None = None,
        out: str | Path | None = None,
        resume: bool | Literal["auto"] = False,
        overwrite: bool = False,
        branch: Branch | None = None,
        start: Start | None = None,
        model: nn.Module | None = None,
        keep: Collection[int] = (),
        on_step: Callable[[Step], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_result: Callable[[Result], None] | None = None,
        world: World = World(),  # noqa: B008 (frozen)
        profile: str | Path | None = None,
        stop: StopRequest | None = None,
        progress: bool = True,
        planned: bool = False,
    ) -> None:
        if not planned:
            check_run(config, world)
        if start is not None and branch is not None:
            raise UsageError("a branch has the weights of its run; pass start or branch, not both")
        self.stop = stop
        self.folder = None if out is None else RunFolder(Path(out))
        if self.folder is not None:
            self.folder.check(resume=bool(resume), overwrite=overwrite, writes=world.rank == 0)
            if overwrite:
                parent = None if branch is None else branch.folder
                self.folder.check_origins({"--init": config.init, "--from": parent})
        self.world = world
        self.device = chosen_device(world.device(config.device))
        check_tf32(config.tf32, self.device)
        config, self.precision_reason = decided(
            config, self.device, world, folder=self.folder, resume=resume, branch=branch
        )
        self.config = config
        self.progress = progress and world.rank == 0
        data = given_or_loaded(config, data, world, progress=self.progress)
        self.data = augmented(config, data).for_run()
        if self.precision_reason is not None and sources:
            sources = {**sources, "precision": f"auto: {self.precision_reason}"}
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.on_result = on_result
        self.keep = frozenset(keep)
        if any(not 1 <= epoch <= config.epochs for epoch in self.keep):
            raise UsageError(
                f"keep must contain epochs from 1 to {config.epochs}, got {sorted(self.keep)}"
            )

        self.contents = self.data.contents(progress=self.progress)
        self.objective = build_objective(
            config, self.data.counts, self.data.groups, device=self.device
        )
        check_selection(config, self.data)
        self._requests = StepRequests(
            lambda: bool(stop), lambda: self.saver.asks(), world, self.device
        )
        check_accumulation(config, self.objective)
        self.batches = EpochBatches.of_run(
            config, self.data, self.objective.views, self.device, world
        )
        first = self.batches.indices(1)
        self.steps_per_epoch = len(first)
        check_batches(first, config, len(self.data.train), world)
        self._stamp = None if self.folder is None else self.folder.stamp()
        resumed = None
        if self.folder is not None:
            resumed = Resume(config, self.data, self.steps_per_epoch, self.keep, world, model).find(
                self.folder, resume
            )
        check_same_checkpoint(resumed, self.folder, world)  # before rank 0 changes the folder
        fresh = resumed is None and branch is None
        self.model, begun = begun_network(
            config,
            self.data,
            self.device,
            world,
            fresh=fresh,
            start=start,
            module=model,
            progress=self.progress,
        )
        self.judged = JudgedWeights(self.model, config)
        engine = Engine.of_run(config, self.model, self.device, world)  # may shard the network
        if engine.is_sharded and self.judged.network is not self.model:
            shard(self.judged.network)
        self.judge = Judge.of_run(
            config, self.judged.network, self.data, self.objective, self.device, world
        )
        self.schedules = build_schedules(config)
        self.optimizer = build_optimizer(
            config,
            self.model,
            steps_per_epoch=self.steps_per_epoch,
            process_group=None if engine.is_sharded else world.process_group,
        )
        self.stepper = Stepper(
            engine,
            self.optimizer,
            self.objective,
            seed=self._own_seed,
            precision=config.precision,
            ascent=AscentBatches.of_run(
                config, self.data, self.objective, seed=self._own_seed, device=self.device
            ),
            accumulate=config.accumulate,
            carry=self._requests.carry,
        )
        self.profile = StepProfile.of_run(profile, self.device, world, self.stepper)
        self.state = RunState(
            config=config,
            data=self.data,
            model=self.model,
            optimizer=self.optimizer,
            judged=self.judged,
            curvature=TrackedCurvature(config, self.data, self.model, writes=world.rank == 0),
            loss_scale=engine.loss_scale,
            world=world,
            steps_per_epoch=self.steps_per_epoch,
            contents=self.contents,
            sources=sources or {},
            keep=tuple(sorted(self.keep)),
            start=begun,
        )
        if resumed is not None:
            self.state.continue_from(resumed)
        elif branch is not None:
            self.state.begin_at(branch)
        same = branch is not None and branch.checkpoint.config.max_norm == config.max_norm
        begun = self.state.start if same or resumed is not None else None
        self.limits = NormLimits.of_run(config, self.model, begun)
        self.state.start = self.limits.recorded(self.state.start)
        options = {**(branch.origin if branch else {}), "keep": sorted(self.keep)}
        settings = run_file_text(
            config, self.state.sources, options=options, processes=world.world_size
        )
        self.saver = Saver(
            self.folder,
            world,
            config,
            self.keep,
            settings=settings,
            fresh=resumed is None,
            sharded=engine.is_sharded,
        )
        self.saver.begin_at(self.state.batches)
        if self._writes is not None:
            with self._writes.held(self._stamp):
                size = checkpoint_bytes(config, self.model)
                self._writes.check_room(size, self.keep, config.keep_last, overwrite=overwrite)
                self._writes.prepare(overwrite=overwrite)
                self._stamp = self._writes.stamp()

    def fit(self) -> Result:
        """Train to the last epoch, write the results to the folder, and return them.

        Raises:
            TrainingError: if the loss, a weight or an output of the network is infinite or NaN, or half of an
                epoch's updates were skipped. The last checkpoint is kept.
            OSError: if a file cannot be written. The previous version of the file is kept.
        """
        folder = self._writes
        bar = ProgressBar(
            total=self.config.epochs,
            description=f"{self.config.method} {self.config.optimizer}",
            unit="epoch",
            enabled=self.progress,
        )
        history = self.state.history
        unwritten: OSError | None = None
        with ExitStack() as stack:
            if folder is not None:
                stack.enter_context(folder.held(self._stamp))
            stack.enter_context(closing(self.saver))
            stack.enter_context(cpu_threads(self.config.threads))
            stack.enter_context(float32_products(self.config.tf32, self.device))
            stack.enter_context(self.stepper.engine.clock or nullcontext())
            stack.enter_context(closing(self.data))
            stack.enter_context(bar)
            stack.enter_context(self.profile or nullcontext())
            stack.enter_context(nullcontext() if self.stop is None else self.stop.deferred())
            self.world.barrier()  # a rank that a signal stops now has made no step
            bar.update(len(history))
            while len(history) < self.config.epochs:
                record = self._train_epoch(len(history) + 1)
                history.append(record)
                self.judged.keep_best(history)
                if self.on_epoch is not None:
                    self.on_epoch(record)
                last = record.epoch == self.config.epochs
                try:
                    self.saver.after_epoch(
                        history, self.state.batches, self.state.checkpoint, last=last
                    )
                except OSError as error:
                    if not last:
                        raise
                    unwritten = error  # evaluate the network before raising it
                bar.update(note=f"loss {record.loss:.3f}, {record.images_per_second:.0f} images/s")
            if self.profile is not None:
                self.profile.finish()
            result = self.state.result(self.judge, self.device)
            if self.on_result is not None:
                self.on_result(result)
            if unwritten is not None:
                raise unwritten
            if folder is not None:
                folder.write(result)
                self._stamp = folder.stamp()
        return result

    @property
    def _writes(self) -> RunFolder | None:
        """The output folder on rank 0; None on other ranks and if nothing is written."""
        return self.folder if self.world.rank == 0 else None

    def _train_epoch(self, epoch: int) -> Epoch:
        options = {name: schedule(epoch) for name, schedule in self.schedules.items()}
        lr = options["lr"]
        set_options(self.optimizer, options)
        totals = EpochTotals(self.stepper, self.device)
        begun, self.state.unfinished = self.state.unfinished, None
        done = parts = 0
        if begun is not None:
            done, parts = begun["batches"], begun["parts"]
            continue_unfinished(begun, totals, self.judged.networks, self.world)
        before = self.state.batches
        first = done - self.stepper.batches
        curvature = self.state.curvature
        if before + done == 0:
            curvature.step(0, lr)
        self.model.train()
        batches = totals.timed(self.batches.read(epoch, start=done))
        for seen in self.stepper.steps(batches, epoch=epoch, parts=parts):
            self.limits.project()
            self.judged.update()
            totals.steps += 1
            for step in seen:
                totals.add(step)
                if self.on_step is not None:
                    self.on_step(step)
            done = first + self.stepper.batches
            curvature.step(before + done, lr)
            if self.profile is not None:
                self.profile.step()
            self._after_step(epoch, done, totals)
        self.judged.average_statistics(self.world)
        record = totals.record(self.world, epoch=epoch, lr=lr, rho=options.get("rho"))
        check_weights(self.model, self.world, epoch=epoch, lr=lr)
        validation, last = self.data.validation, epoch == self.config.epochs
        if validation is not None and (last or epoch % self.config.validate_every == 0):
            with self.stepper.section(EVALUATION):
                found = self.judge.predictions(validation)
            record = replace(
                record,
                validation_accuracy=found.accuracy,
                validation_balanced=found.balanced_accuracy,
            )
        return replace(record, seconds=totals.seconds)

    def _after_step(self, epoch: int, done: int, totals: EpochTotals) -> None:
        """Save and stop if it is due.

        Args:
            epoch: epoch, counted from 1.
            done: number of batches of the epoch so far.
            totals: totals of the epoch so far.
        """

        def checkpoint() -> Checkpoint:
            networks, parts = self.judged.networks, self.stepper.parts
            return self.state.checkpoint(
                unfinished_state(totals, networks, self.world, batches=done, parts=parts)
            )

        asked = self._requests.after_step()
        self.saver.after_step(self.state.batches + done, checkpoint, now=asked.stop or asked.save)
        if asked.stop:
            self.saver.finish_stopped()
            name = getattr(self.stop, "signal", None) or "a signal to another process"
            saved = "to continue, run the same command with --resume auto"
            raise Stopped(
                f"stopped by {name} after step {done} of epoch {epoch}; "
                + (saved if self.folder else "nothing was saved without --out")
            )

    @property
    def _own_seed(self) -> int:
        """Seed of random numbers that differ between ranks: masks of the loss and samples of batches."""
        seed, rank = self.config.seed, self.world.rank
        return seed if rank == 0 else derived_seed(seed, Stream.RANK, rank)
