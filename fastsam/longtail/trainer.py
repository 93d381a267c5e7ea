"""Training of one configuration, from the first weights to the metrics on the test set."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.files import check_room
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig, differences
from fastsam.longtail.contrastive import PaCoClassifier, PaCoLoss
from fastsam.longtail.data import Batch, DataOptions, Images, LongTailData, load_dataset
from fastsam.longtail.data.catalog import GIVEN
from fastsam.longtail.errors import CheckpointError, TrainingError, UsageError
from fastsam.longtail.losses import LongTailLoss, adjust_logits
from fastsam.longtail.metrics import Metrics, evaluate
from fastsam.longtail.network import build_network, not_finite
from fastsam.longtail.objectives import Objective, double_adjustment
from fastsam.longtail.optimizers import (
    batches_for_steps,
    build_optimizer,
    set_schedule,
    skipped_steps,
    skips_nonfinite_steps,
    take_step,
    unless_skipped,
)
from fastsam.longtail.predictions import Predictions, predict
from fastsam.longtail.ranks import Ranks
from fastsam.longtail.results import Epoch, Result, RunFolder
from fastsam.longtail.runtime import chosen_device, environment
from fastsam.longtail.samplers import build_sampler
from fastsam.longtail.schedules import ascent_radius, learning_rate
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.progress import ProgressBar
from fastsam.threads import cpu_threads

SECOND_VIEW_EPOCHS = 1 << 32
"""The second view of an epoch is drawn as that of an epoch so much later."""
CHECKPOINT_SECONDS = 10.0
"""A checkpoint is written after an epoch if the last one is older than this, and after the last."""


@dataclass(frozen=True)
class Step:
    """What the first pass over one batch saw.

    Attributes:
        epoch: counted from 1.
        batch: batch of the epoch (for LPF-SGD, part of a batch), counted from 0.
        loss: scalar loss that was differentiated.
        logits: ``[B, C]``.
        features: what the head was given, ``[B, D]``.
        targets: int64 ``[B]``.
        indices: samples of the batch, positions in the training set, int64 ``[B]``.
    """

    epoch: int
    batch: int
    loss: Tensor
    logits: Tensor
    features: Tensor
    targets: Tensor
    indices: Tensor


class Trainer:
    """Trains one configuration and judges the weights after the last epoch.

    ``select="best-validation"`` in the settings judges, and says so, those of the best epoch on the
    validation set; the test set never selects anything.

    Args:
        config: the settings; :func:`fastsam.longtail.recipe` makes them.
        data: the data set; None to load the one that ``config`` names.
        sources: where each setting comes from, kept with the result; by default, of a resumed run,
            what its checkpoint says.
        out: folder for checkpoint and results; None to write nothing.
        resume: go on with the run in ``out``; ``"auto"`` begins it where there is no checkpoint.
        overwrite: replace the run in ``out``.
        keep: epochs after which the checkpoint is also kept as ``out/epoch-K.pt``.
        on_step: called after every step with what it saw of each of its batches.
        on_epoch: called with the record of every finished epoch.
        on_result: called with the result before it is written.
        ranks: this process among those of the run; by default it is alone. Batches are shared out,
            and the loss and its gradient are those of the whole batch, whatever the number of
            processes; batch normalisation sees the share of its process.
        progress: show progress: a bar on a terminal, a line a minute elsewhere.

    Raises:
        UsageError: an ``out`` that is not empty, or a device that does not exist.
        DataError: data that is missing or damaged.
        CheckpointError: the run cannot be resumed.
        FolderBusyError: another process writes to ``out``.
        OSError: ``out`` cannot be written to, or has too little room.

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
        out: Path | None = None,
        resume: bool | Literal["auto"] = False,
        overwrite: bool = False,
        keep: Collection[int] = (),
        on_step: Callable[[Step], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_result: Callable[[Result], None] | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        progress: bool = True,
    ) -> None:
        _check_ranks(config, ranks)
        twice = double_adjustment(config)
        if twice is not None and ranks.rank == 0:
            warnings.warn(twice, stacklevel=2)
        self.folder = None if out is None else RunFolder(out)
        if self.folder is not None:
            self.folder.check(resume=bool(resume), overwrite=overwrite, writes=ranks.rank == 0)
        self.config = config
        self.ranks = ranks
        self.device = chosen_device(ranks.device(config.device))
        self.progress = progress and ranks.rank == 0
        if data is None:
            data = load_configured(config, progress=self.progress)
        elif config.data not in (data.name, f"{GIVEN}{data.name}"):
            raise UsageError(
                f"the settings are of the data set {config.data}, but the data are {data.name!r}; make "
                f"the settings by recipe('{GIVEN}{data.name}', ...)"
            )
        self.data = data.for_run()
        self.sources = sources or {}
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.on_result = on_result
        self.keep = frozenset(keep)
        if any(not 1 <= epoch <= config.epochs for epoch in self.keep):
            raise UsageError(f"epochs to keep are 1 to {config.epochs}, got {sorted(self.keep)}")

        self.contents = self.data.contents(progress=self.progress)
        self.channels = self.data.test.channels
        self.model = build_network(config, self.data.num_classes, self.channels).to(self.device)
        if config.channels_last:
            # Filters in this order are enough: the maps that they make take it over.
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.model)
        self.objective = Objective(config, self.data.counts, device=self.device)
        self.sampler = build_sampler(
            config,
            self.data.train.targets,
            self.data.counts,
            rank=ranks.rank,
            world_size=ranks.size,
        )
        first = self._batches(self.sampler.order(1))
        self.steps_per_epoch = len(first)
        alone = min(len(batch) for batch in first) if first else 0
        if alone < 2:
            raise UsageError(
                f"a batch would have {alone} image, of which batch normalisation has no variance and "
                f"class weights no effect: {config.data} has {len(self.data.train)} training images, "
                f"batch_size is {config.batch_size} and processes are {ranks.size}; give every "
                "process at least 2 images of a batch"
            )
        self.history: list[Epoch] = []
        self._best: dict[str, Tensor] | None = None
        self._unreadable_before: dict[str, int] = {}
        if config.select == "best-validation" and self.data.validation is None:
            raise UsageError(f"{config.data} has no validation set to select an epoch by")

        self._stamp = None if self.folder is None else self.folder.stamp()
        resumed = self._load(resume) if self.folder is not None else None
        ranks.barrier()  # everyone has read what is there
        if resumed is not None:
            self.model.load_state_dict(resumed.model)
            resumed.load_optimizer(self.optimizer)
            self.history = list(resumed.history)
            self._best = resumed.best
            self._unreadable_before = resumed.unreadable
            self.sources = self.sources or resumed.sources
        if self._writes is not None:
            with self._writes.held(self._stamp):
                self._writes.prepare(overwrite=overwrite)
                check_room(self._writes.path, *self._sizes())
                self._stamp = self._writes.stamp()

    def fit(self) -> Result:
        """Train to the last epoch, write the results to the folder, and return them.

        Raises:
            TrainingError: if the loss, a weight or an output of the network is no longer finite, or half
                of an epoch's updates were skipped; the folder keeps its last checkpoint.
            OSError: if a file cannot be written; the one before it is whole.
        """
        saved = time.perf_counter()
        bar = ProgressBar(
            total=self.config.epochs,
            description=f"{self.config.method} {self.config.optimizer}",
            unit="epoch",
            enabled=self.progress,
        )
        unwritten: OSError | None = None
        with ExitStack() as stack:
            if self._writes is not None:
                stack.enter_context(self._writes.held(self._stamp))
            stack.enter_context(cpu_threads(self.config.threads))
            stack.enter_context(closing(self.data))
            stack.enter_context(bar)
            bar.update(len(self.history))
            while len(self.history) < self.config.epochs:
                record = self._train_epoch(len(self.history) + 1)
                self.history.append(record)
                self._keep_best()
                if self.on_epoch is not None:
                    self.on_epoch(record)
                now = time.perf_counter()
                last = record.epoch == self.config.epochs
                try:
                    if record.epoch in self.keep and self._writes is not None:
                        self._checkpoint().save(self._writes.kept(record.epoch))
                    if now - saved > CHECKPOINT_SECONDS or last:
                        self._save()
                        saved = now
                except OSError as error:
                    if not last:
                        raise
                    unwritten = error  # the network can still be judged
                bar.update(note=f"loss {record.loss:.3f}")
            result = self._result()
            if self.on_result is not None:
                self.on_result(result)
            if unwritten is not None:
                raise unwritten
            if self._writes is not None:
                self._writes.write(result)
                self._stamp = self._writes.stamp()
        return result

    @property
    def _writes(self) -> RunFolder | None:
        """The folder that this process writes to, if any."""
        return self.folder if self.ranks.rank == 0 else None

    def _train_epoch(self, epoch: int) -> Epoch:
        began = time.perf_counter()
        config = self.config
        lr, rho = learning_rate(config, epoch), ascent_radius(config, epoch)
        skipped_before = skipped_steps(self.optimizer)
        skips = skips_nonfinite_steps(self.optimizer)
        steps = 0
        set_schedule(self.optimizer, lr=lr, rho=rho)
        loss_fn = self.objective.at(epoch)
        order = self.sampler.order(epoch)
        self.model.train()
        # Sums stay on the device: reading them back at every batch would stall an accelerator.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        counted = torch.zeros(3, dtype=torch.int64, device=self.device)  # right, seen, with a loss
        batches = self._read_epoch(order, epoch)
        for pieces in batches_for_steps(self.optimizer, batches):
            for step in self._step(pieces, loss_fn, epoch=epoch):
                images = len(step.targets)
                # Such a loss says nothing of the others where the optimizer skips its step.
                known = step.loss.isfinite() | (not skips)
                loss_sum += torch.where(known, step.loss.double() * images, 0.0)
                counted += torch.stack(
                    [
                        (step.logits.argmax(dim=1) == step.targets).sum(),
                        torch.full_like(known, images, dtype=torch.int64),
                        known * images,
                    ]
                )
                if self.on_step is not None:
                    self.on_step(step)
            steps += 1
        self.ranks.add_up([loss_sum, counted])
        self._share_statistics()
        right, seen, with_loss = counted.tolist()
        if seen == 0:
            raise TrainingError(f"no image of epoch {epoch} could be read")
        mean = float(loss_sum) / max(with_loss, 1)
        skipped = skipped_steps(self.optimizer) - skipped_before
        if 2 * skipped >= steps or not math.isfinite(mean):
            what = (
                f"the loss is {mean}"
                if 2 * skipped < steps
                else f"gradients were infinite or NaN in {skipped} of {steps} steps"
            )
            raise TrainingError(
                f"{what} in epoch {epoch}; train again (--overwrite) with a lower learning rate "
                f"(now {lr:g})" + ("" if rho is None else f" or rho (now {rho:g})")
            )
        spoiled = not_finite(self.model)
        if spoiled is not None:
            raise TrainingError(
                f"{spoiled} of the network is infinite or NaN after epoch {epoch}; look for such values "
                f"in the images, or train again (--overwrite) with a lower learning rate (now {lr:g})"
            )
        validation = self.data.validation
        return Epoch(
            epoch=epoch,
            lr=lr,
            rho=rho,
            loss=mean,
            train_accuracy=100.0 * right / seen,
            validation_accuracy=None
            if validation is None
            else self._predictions(validation).accuracy,
            seconds=time.perf_counter() - began,
            skipped=skipped,
        )

    def _autocast(self) -> torch.autocast:
        """A context of its own for every pass: its cache of cast weights must not outlive them."""
        enabled = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @property
    def _own_seed(self) -> int:
        """The seed of what each process draws for itself: augmentation and masks of the loss."""
        seed, rank = self.config.seed, self.ranks.rank
        return seed if rank == 0 else derived_seed(seed, Stream.RANK, rank)

    def _share_statistics(self) -> None:
        """The mean over the processes of the running statistics of batch normalisation."""
        if self.ranks.size == 1:
            return
        statistics = [value for value in self.model.buffers() if value.is_floating_point()]
        self.ranks.add_up(statistics)
        for value in statistics:
            value.div_(self.ranks.size)

    def _best_epoch(self) -> int:
        """The first epoch of the highest validation accuracy."""
        return max(self.history, key=lambda record: record.validation_accuracy or 0.0).epoch

    def _keep_best(self) -> None:
        if self.config.select != "last" and self._best_epoch() == len(self.history):
            self._best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def _batches(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut the indices of an epoch into batches; a lone last image joins the batch before."""
        size = self.config.batch_size // self.ranks.size
        cuts = list(range(size, len(order), size))
        if cuts and len(order) - cuts[-1] == 1:
            cuts.pop()
        return np.array_split(order, cuts)

    def _read_epoch(self, order: NDArray[np.int64], epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, with a second view for contrastive learning."""
        read = partial(
            self.data.train.batches,
            self._batches(order),
            augment=self.config.augment,
            seed=self._own_seed,
            device=self.device,
        )
        if not isinstance(self.model, PaCoClassifier):
            yield from read(epoch=epoch)
            return
        for batch, other in zip(
            read(epoch=epoch), read(epoch=epoch + SECOND_VIEW_EPOCHS), strict=True
        ):
            yield batch._replace(second_view=other.inputs)

    def _step(
        self, pieces: list[tuple[int, Batch]], loss_fn: LongTailLoss | PaCoLoss, *, epoch: int
    ) -> list[Step]:
        """Take one optimizer step on ``pieces``; what the first pass over each of them saw."""
        seen: dict[int, Step] = {}
        keys: dict[int, Tensor] = {}

        def loss_of(number: int, batch: Batch, logits: Tensor, features: Tensor) -> Tensor:
            model = self.model
            if isinstance(loss_fn, LongTailLoss):
                loss_fn.reseed(derived_seed(self._own_seed, Stream.LOSS, epoch, number))
                total, weight = loss_fn.sums(logits, batch.targets, features)
                weight = weight.detach().clone()
                self.ranks.add_up([weight])
                return total / weight
            if not isinstance(model, PaCoClassifier) or batch.second_view is None:
                raise AssertionError("paco comes with its own network and two views")
            # All passes of a step compare with the same keys.
            if number not in keys:
                with self._autocast():
                    keys[number] = model.keys(batch.second_view).float()
            return model.contrast(
                loss_fn, logits.float(), features.float(), keys[number], batch.targets
            )

        def gradient(number: int, batch: Batch) -> Tensor:
            with self._autocast():
                features = self.model.features(batch.inputs)
                logits = self.model.head(features)
            loss = loss_of(number, batch, logits, features)
            loss.backward()  # type: ignore[no-untyped-call]
            value = loss.detach().clone()
            trained = (p.grad for p in self.model.parameters() if p.grad is not None)
            self.ranks.add_up([value, *trained])
            if number not in seen:
                seen[number] = Step(
                    epoch=epoch,
                    batch=number,
                    loss=value,
                    logits=logits.detach(),
                    features=features.detach(),
                    targets=batch.targets,
                    indices=batch.indices,
                )
            return value

        with unless_skipped(self.optimizer, self._changed_by_passes()):
            take_step(self.optimizer, self.model, [partial(gradient, *piece) for piece in pieces])
            if isinstance(self.model, PaCoClassifier):
                for number, step in seen.items():
                    self.model.advance(keys[number], step.targets)
        return list(seen.values())

    def _changed_by_passes(self) -> list[Tensor]:
        """What a step changes besides the trained weights: statistics, and PaCo's copy and queue."""
        frozen = [value for value in self.model.parameters() if not value.requires_grad]
        return [*self.model.buffers(), *frozen]

    def _predictions(self, images: Images) -> Predictions:
        """For selecting and for judging alike."""
        return predict(
            self.model,
            images,
            self.device,
            batch_size=self.config.batch_size // self.ranks.size,
            adjust=self._adjusted,
            ranks=self.ranks,
        )

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Logits ``[B, C]`` as the loss scales them, with the post-hoc adjustment."""
        logits = self.objective.logit_scale * logits
        tau = self.config.posthoc_tau
        return adjust_logits(logits, self.data.counts, tau) if tau else logits

    def _metrics(self, images: Images) -> Metrics:
        return evaluate(self._predictions(images), self.data.groups, self.data.counts)

    def _result(self) -> Result:
        data = self.data
        rule = "last epoch"
        if self._best is not None:
            self.model.load_state_dict(self._best)
            rule = f"best epoch on validation ({self._best_epoch()})"
        return Result(
            config=self.config.as_dict(),
            sources=self.sources,
            counts=data.counts.tolist(),
            class_names=list(data.class_names),
            groups={name: list(members) for name, members in data.groups.items()},
            subset_hash=data.subset_hash,
            contents=self.contents,
            steps_per_epoch=self.steps_per_epoch,
            rule=rule,
            test=self._metrics(data.test),
            validation=None if data.validation is None else self._metrics(data.validation),
            history=self.history,
            seconds=sum(record.seconds for record in self.history),
            unreadable=self._unreadable(),
            environment={**environment(self.device), "processes": self.ranks.size},
            unseen=None if data.unseen is None else self._metrics(data.unseen),
        )

    def _unreadable(self) -> dict[str, int]:
        """How often each image was skipped, training and evaluation together, since the start."""
        met = Counter(self._unreadable_before)
        for images in self.data.splits.values():
            met.update(images.unreadable)
            # A scan meets an image once, however often the run is resumed.
            met.update({name: 1 for name in images.left_out if name not in met})
        return dict(met)

    def _check_older(self, checkpoint: Checkpoint) -> None:
        """Refuse runs of older versions that would not go on as they began."""
        size = self.config.batch_size // self.ranks.size
        if len(self.sampler.order(1)) % size == 1:
            raise CheckpointError(
                "an older version began this run, with a last batch of one image in every epoch; this "
                "image now joins the batch before, so train again (--overwrite)"
            )
        if checkpoint.unreadable and any(i.left_out for i in self.data.splits.values()):
            raise CheckpointError(
                "an older version began this run and kept images that cannot be read in its class "
                "counts; they are now left out before training, so train again (--overwrite)"
            )

    def _save(self) -> None:
        if self._writes is not None:
            self._checkpoint().save(self._writes.checkpoint)
            self._writes.write_history(self.history)

    def _sizes(self) -> list[int]:
        """About the bytes of each checkpoint that will lie in the folder beside what is there."""
        config, folder = self.config, self.folder
        state = sum(value.nbytes for value in self.model.state_dict().values())
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        copies = (config.momentum > 0) + (config.optimizer == "looksam")
        size = (1 + (config.select != "last")) * state + copies * trained + (1 << 16)
        coming = 0 if folder is None else 1 + (not folder.checkpoint.is_file())
        coming += sum(1 for epoch in self.keep if folder and not folder.kept(epoch).is_file())
        return [size] * coming

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            epoch=len(self.history),
            channels=self.channels,
            num_classes=self.data.num_classes,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            history=list(self.history),
            best=self._best,
            unreadable=self._unreadable(),
            sources=self.sources,
            subset_hash=self.data.subset_hash,
            contents=self.contents,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _load(self, resume: bool | Literal["auto"]) -> Checkpoint | None:
        if not resume or self.folder is None:
            return None
        for path in self.folder.checkpoints() or (
            [] if resume == "auto" else [self.folder.checkpoint]
        ):
            checkpoint = Checkpoint.load(path)
            self._check_same_run(path, checkpoint)
            past = [epoch for epoch in sorted(self.keep) if epoch <= checkpoint.epoch]
            missing = [epoch for epoch in past if not self.folder.kept(epoch).is_file()]
            if not missing:
                return checkpoint
            if resume != "auto":
                raise CheckpointError(
                    f"{self.folder.path} is past epoch {missing[0]} and kept no checkpoint of it; "
                    "choose another --out to train again"
                )
        return None

    def _check_same_run(self, path: Path, checkpoint: Checkpoint) -> None:
        """Raise :class:`CheckpointError` unless this run can go on from a checkpoint."""
        stored, wanted = checkpoint.config.as_dict(), self.config.as_dict()
        for name in differences(stored, wanted, same_content=bool(checkpoint.contents)):
            raise CheckpointError(
                f"{path} is of another run: {name} is {stored[name]} there and "
                f"{wanted[name]} here; resume with the same settings or choose another --out"
            )
        checkpoint.check_data(self.data)
        if checkpoint.steps_per_epoch not in (None, self.steps_per_epoch):
            raise CheckpointError(
                f"{path} is of a run with {checkpoint.steps_per_epoch} steps in an epoch, here there are "
                f"{self.steps_per_epoch}; other images can be read now, or the number of processes is "
                "another one: restore them, or train again"
            )
        if checkpoint.steps_per_epoch is None:
            self._check_older(checkpoint)
        checkpoint.build_model()
        checkpoint.check_best()


def load_configured(config: TrainConfig, *, progress: bool = True) -> LongTailData:
    """The data set of a configuration; ``progress`` shows a bar if it must be made first."""
    options = {
        "imbalance": config.imbalance,
        "kind": config.kind,
        "subset_seed": config.subset_seed,
        "root": None if config.data_root is None else Path(config.data_root),
        "download": config.download,
        "size": config.image_size,
        "workers": config.workers,
        "corrupt": config.corrupt,
        "exif": config.exif,
        "value_range": config.value_range,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return load_dataset(config.data, DataOptions(**given, progress=progress))


def _check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raise :class:`UsageError` if several processes cannot do this run together."""
    if ranks.size == 1:
        return
    if config.batch_size % ranks.size:
        raise UsageError(
            f"batch_size is that of all processes together: {config.batch_size} is not a multiple "
            f"of {ranks.size}"
        )
    if config.parsed_method.loss == "paco":
        raise UsageError("paco runs in one process: its queue and keys are not shared")
    if config.corrupt == "skip":
        raise UsageError("several processes need --corrupt stop: they must see as many batches")
