"""Training of one configuration, from the first weights to the metrics on the test set."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.contrastive import PaCoClassifier, PaCoLoss
from fastsam.longtail.data import Batch, DataOptions, Images, LongTailData, load_dataset
from fastsam.longtail.errors import CheckpointError, TrainingError, UsageError
from fastsam.longtail.losses import LongTailLoss, adjust_logits
from fastsam.longtail.metrics import Metrics, evaluate
from fastsam.longtail.models import Classifier
from fastsam.longtail.network import build_network
from fastsam.longtail.objectives import Objective
from fastsam.longtail.optimizers import (
    batches_for_steps,
    build_optimizer,
    set_schedule,
    take_step,
)
from fastsam.longtail.results import Epoch, Result, RunFolder
from fastsam.longtail.samplers import build_sampler
from fastsam.longtail.schedules import ascent_radius, learning_rate
from fastsam.longtail.seeds import Stream, derived_seed
from fastsam.progress import ProgressBar

EVALUATION_BATCH = 512
SECOND_VIEW_EPOCHS = 1 << 32
"""The second view of an epoch is drawn as that of an epoch so much later."""
CHECKPOINT_SECONDS = 60.0
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
        sources: where each setting comes from, kept with the result.
        out: folder for checkpoint and results; None to write nothing.
        resume: go on with the run in ``out``.
        overwrite: replace the run in ``out``.
        keep: epochs after which the checkpoint is also kept as ``out/epoch-K.pt``.
        on_step: called after every step with what it saw of each of its batches.
        on_epoch: called with the record of every finished epoch.
        progress: show a progress bar on a terminal.

    Raises:
        UsageError: an ``out`` that is not empty, or a device that does not exist.
        DataError: data that is missing or damaged.
        CheckpointError: a run that cannot be gone on with.

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
        resume: bool = False,
        overwrite: bool = False,
        keep: Collection[int] = (),
        on_step: Callable[[Step], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config
        self.device = chosen_device(config.device)
        self.data = data if data is not None else load_configured(config)
        self.sources = sources or {}
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.progress = progress
        self.folder = None if out is None else RunFolder(out)
        self.keep = frozenset(keep)
        if any(not 1 <= epoch <= config.epochs for epoch in self.keep):
            raise UsageError(f"epochs to keep are 1 to {config.epochs}, got {sorted(self.keep)}")

        first = next(iter(_read(self.data.test, self.device, limit=1)))
        self.channels = first.inputs.shape[1]
        self.model = build_network(config, self.data.num_classes, self.channels).to(self.device)
        self.optimizer = build_optimizer(config, self.model)
        self.objective = Objective(config, self.data.counts, device=self.device)
        self.sampler = build_sampler(config, self.data.train.targets, self.data.counts)
        self.history: list[Epoch] = []
        self._best: dict[str, Tensor] | None = None
        if config.select == "best-validation" and self.data.validation is None:
            raise UsageError(f"{config.data} has no validation set to select an epoch by")

        resumed = self._load(resume) if self.folder is not None else None
        if self.folder is not None:
            self.folder.prepare(resume=resume, overwrite=overwrite)
        if resumed is not None:
            self.model.load_state_dict(resumed.model)
            self.optimizer.load_state_dict(resumed.optimizer)
            self.history = [Epoch(**record) for record in resumed.history]
            self._best = resumed.best

    def fit(self) -> Result:
        """Train to the last epoch, write the results to the folder, and return them.

        Raises:
            TrainingError: if the loss is no longer finite; the folder keeps its last checkpoint.
        """
        began = saved = time.perf_counter()
        bar = ProgressBar(
            total=self.config.epochs,
            description=f"{self.config.method} {self.config.optimizer}",
            unit="epoch",
            enabled=self.progress,
        )
        with cpu_threads(self.config.threads), bar:
            bar.update(len(self.history))
            while len(self.history) < self.config.epochs:
                record = self._train_epoch(len(self.history) + 1)
                self.history.append(record)
                self._keep_best()
                if self.on_epoch is not None:
                    self.on_epoch(record)
                if record.epoch in self.keep and self.folder is not None:
                    self._checkpoint().save(self.folder.kept(record.epoch))
                now = time.perf_counter()
                if now - saved > CHECKPOINT_SECONDS or record.epoch == self.config.epochs:
                    self._save()
                    saved = now
                bar.update(note=f"loss {record.loss:.3f}")
            result = self._result(seconds=time.perf_counter() - began)
        if self.folder is not None:
            self.folder.write(result)
        return result

    def _train_epoch(self, epoch: int) -> Epoch:
        began = time.perf_counter()
        config = self.config
        lr, rho = learning_rate(config, epoch), ascent_radius(config, epoch)
        set_schedule(self.optimizer, lr=lr, rho=rho)
        loss_fn = self.objective.at(epoch)
        order = self.sampler.order(epoch)
        self.model.train()
        # Sums stay on the device: reading them back at every batch would stall an accelerator.
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        batches = self._read_epoch(order, epoch)
        seen = 0
        for pieces in batches_for_steps(self.optimizer, batches):
            for step in self._step(pieces, loss_fn, epoch=epoch):
                loss_sum += step.loss.double() * len(step.targets)
                right += (step.logits.argmax(dim=1) == step.targets).sum()
                seen += len(step.targets)
                if self.on_step is not None:
                    self.on_step(step)
        if seen == 0:
            raise TrainingError(f"no image of epoch {epoch} could be read")
        mean = float(loss_sum) / seen
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} in epoch {epoch}; lower the learning rate (now {lr:g})"
                + ("" if rho is None else f" or rho (now {rho:g})")
            )
        validation = self.data.validation
        return Epoch(
            epoch=epoch,
            lr=lr,
            rho=rho,
            loss=mean,
            train_accuracy=100.0 * int(right) / seen,
            validation_accuracy=None if validation is None else self._accuracy(validation),
            seconds=time.perf_counter() - began,
        )

    def _best_epoch(self) -> int:
        """The first epoch of the highest validation accuracy."""
        return max(self.history, key=lambda record: record.validation_accuracy or 0.0).epoch

    def _keep_best(self) -> None:
        if self.config.select != "last" and self._best_epoch() == len(self.history):
            self._best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def _read_epoch(self, order: NDArray[np.int64], epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, with a second view for contrastive learning."""
        size = self.config.batch_size
        read = partial(
            self.data.train.batches,
            np.array_split(order, range(size, len(order), size)),
            augment=self.config.augment,
            seed=self.config.seed,
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
                loss_fn.reseed(derived_seed(self.config.seed, Stream.LOSS, epoch, number))
                loss: Tensor = loss_fn(logits, batch.targets, features)
                return loss
            if not isinstance(model, PaCoClassifier) or batch.second_view is None:
                raise AssertionError("paco comes with its own network and two views")
            # All passes of a step compare with the same keys.
            if number not in keys:
                keys[number] = model.keys(batch.second_view)
            return model.contrast(loss_fn, logits, features, keys[number], batch.targets)

        def gradient(number: int, batch: Batch) -> Tensor:
            features = self.model.features(batch.inputs)
            logits = self.model.head(features)
            loss = loss_of(number, batch, logits, features)
            loss.backward()  # type: ignore[no-untyped-call]
            if number not in seen:
                seen[number] = Step(
                    epoch=epoch,
                    batch=number,
                    loss=loss.detach(),
                    logits=logits.detach(),
                    features=features.detach(),
                    targets=batch.targets,
                    indices=batch.indices,
                )
            return loss

        take_step(self.optimizer, self.model, [partial(gradient, *piece) for piece in pieces])
        if isinstance(self.model, PaCoClassifier):
            for number, step in seen.items():
                self.model.advance(keys[number], step.targets)
        return list(seen.values())

    def _accuracy(self, images: Images) -> float:
        logits, targets = predict(self.model, images, self.device)
        return 100.0 * float((logits.argmax(dim=1) == targets).double().mean())

    def _metrics(self, images: Images) -> Metrics:
        logits, targets = predict(self.model, images, self.device)
        if self.config.posthoc_tau:
            logits = adjust_logits(logits, self.data.counts, self.config.posthoc_tau)
        return evaluate(logits, targets, self.data.groups, self.data.counts)

    def _result(self, *, seconds: float) -> Result:
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
            rule=rule,
            test=self._metrics(data.test),
            validation=None if data.validation is None else self._metrics(data.validation),
            history=self.history,
            seconds=seconds,
            unreadable=dict(getattr(data.train, "unreadable", {})),
            environment=environment(self.device),
        )

    def _save(self) -> None:
        if self.folder is not None:
            self._checkpoint().save(self.folder.checkpoint)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            epoch=len(self.history),
            channels=self.channels,
            num_classes=self.data.num_classes,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            history=[asdict(record) for record in self.history],
            best=self._best,
        )

    def _load(self, resume: bool) -> Checkpoint | None:
        if not resume or self.folder is None:
            return None
        checkpoint = Checkpoint.load(self.folder.checkpoint)
        stored, wanted = checkpoint.config.as_dict(), self.config.as_dict()
        for name, value in wanted.items():
            if stored[name] != value and name != "device":
                raise CheckpointError(
                    f"{self.folder.checkpoint} is of another run: {name} is {stored[name]} there "
                    f"and {value} here; resume with the same settings or choose another --out"
                )
        for epoch in sorted(self.keep):
            if epoch <= checkpoint.epoch and not self.folder.kept(epoch).is_file():
                raise CheckpointError(
                    f"{self.folder.path} is past epoch {epoch} and kept no checkpoint of it; choose "
                    "another --out to train it anew"
                )
        checkpoint.build_model()
        return checkpoint


@torch.no_grad()
def predict(model: Classifier, images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` and targets ``[N]`` of a whole set, in evaluation mode, on the CPU."""
    training = model.training
    model.eval()
    try:
        pairs = [
            (model(batch.inputs).cpu(), batch.targets.cpu()) for batch in _read(images, device)
        ]
    finally:
        model.train(training)
    logits, targets = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(targets)


def load_configured(config: TrainConfig) -> LongTailData:
    """The data set of a configuration."""
    options = {
        "imbalance": config.imbalance,
        "kind": config.kind,
        "subset_seed": config.subset_seed,
        "root": None if config.data_root is None else Path(config.data_root),
        "download": config.download,
        "size": config.image_size,
        "workers": config.workers,
        "corrupt": config.corrupt,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return load_dataset(config.data, DataOptions(**given))


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads of torch, 0 for as many as there are now; then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads and device, for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _read(images: Images, device: torch.device, *, limit: int | None = None) -> Any:
    count = len(images) if limit is None else min(limit, len(images))
    chunks: list[NDArray[np.int64]] = np.array_split(
        np.arange(count), range(EVALUATION_BATCH, count, EVALUATION_BATCH)
    )
    return images.batches(chunks, augment=False, seed=0, epoch=0, device=device)


def chosen_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        UsageError: if there is none of that name.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; valid: cpu, cuda, cuda:0, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch finds no usable NVIDIA GPU here; use --device cpu")
    return device
