"""The state of a training run on disk."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.serialization import get_crc32_options, set_crc32_options

from fastsam.files import write_atomically
from fastsam.longtail.build import build_network
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData, Preprocessing
from fastsam.longtail.errors import CheckpointError, DamagedError
from fastsam.longtail.finite import not_finite
from fastsam.longtail.models import Classifier
from fastsam.longtail.results import Epoch, best_epoch, judged_rule
from fastsam.records import build

FORMAT = "fastsam-longtail"
VERSION = 1


@dataclass(eq=False)
class Checkpoint:
    """Everything needed to go on training, or to look at what was learnt.

    Attributes:
        config: settings of the run.
        epoch: epochs completed.
        channels: channels of the input images.
        num_classes: number of classes.
        model: state of the network.
        optimizer: state of the optimizer.
        history: one record per completed epoch.
        best: state of the judged network after the best epoch on validation, where that was asked for.
        unreadable: images that could not be read and were skipped so far, with how often.
        sources: where each setting comes from.
        subset_hash: SHA-256 of the training set, which says what the classes' numbers mean.
        contents: SHA-256 of contents and classes of every split; empty in runs of older versions.
        steps_per_epoch: batches of an epoch; None in runs of older versions.
        parent: the run that this one continues, and from which epoch; None for a run of its own.
        class_names: one per class; empty in runs of older versions.
        counts: training images of each class; empty in runs of older versions.
        groups: classes of head, mid and tail; empty in runs of older versions.
        average: state of the network with averaged weights, in runs with ``ema``.
        preprocessing: how an image file becomes the network's input; None where that is unknown, and in
            runs of older versions.
    """

    config: TrainConfig
    epoch: int
    channels: int
    num_classes: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[Epoch]
    best: dict[str, Any] | None = None
    unreadable: dict[str, int] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    subset_hash: str | None = None
    contents: dict[str, str] = field(default_factory=dict)
    steps_per_epoch: int | None = None
    parent: dict[str, Any] | None = None
    class_names: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    average: dict[str, Any] | None = None
    preprocessing: Preprocessing | None = None

    def save(self, path: str | Path) -> None:
        """Write the file atomically: a crash leaves the previous checkpoint whole.

        Raises:
            OSError: the file cannot be written; the message says how much room it needs.
        """
        content = {
            **vars(self),
            "history": [asdict(record) for record in self.history],
            "config": self.config.as_dict(),
            "preprocessing": self.preprocessing and self.preprocessing.as_dict(),
            "format": FORMAT,
            "version": VERSION,
        }
        with _checksums():
            write_atomically(Path(path), lambda file: torch.save(content, file))

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a checkpoint without running any code in it (``weights_only=True``).

        The checksums of the archive are verified first. Tensors arrive on the CPU.

        Raises:
            DamagedError: if the file is damaged, or no archive of torch.
            CheckpointError: if the file is missing, not of this format, of a version that this
                package does not read, or contradicts itself.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "checkpoint.pt"
        if not path.is_file():
            raise CheckpointError(
                f"no checkpoint at {path}; `fastsam train --out DIR` writes DIR/checkpoint.pt"
            )
        content = _read(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of `fastsam train`")
        version = content.get("version")
        if not isinstance(version, int) or version != VERSION:
            raise CheckpointError(
                f"{path} has checkpoint version {version!r:.20}, this package reads {VERSION}"
            )
        known = cls.__dataclass_fields__
        try:
            fields = {name: content[name] for name in content if name in known}
            config = TrainConfig.from_dict(fields.pop("config", {}))
            checkpoint = build(cls, fields, config=config)
            checkpoint._check()
        except ValueError as error:
            raise CheckpointError(
                f"{path} does not fit this version of fastsam: {error}"
            ) from error
        return checkpoint

    def _check(self) -> None:
        """Raise ValueError if the fields contradict each other."""
        if [record.epoch for record in self.history] != list(range(1, self.epoch + 1)):
            raise ValueError(
                f"epoch is {self.epoch}, but the history has {len(self.history)} records, or not "
                "those of epochs 1, 2, ..."
            )
        if self.epoch > self.config.epochs:
            raise ValueError(f"epoch is {self.epoch} of {self.config.epochs}")
        if self.channels < 1 or self.num_classes < 2:
            raise ValueError(f"{self.channels} channels, {self.num_classes} classes")
        if len(self.counts) != len(self.class_names) or len(self.counts) not in (
            0,
            self.num_classes,
        ):
            raise ValueError(
                f"{len(self.counts)} counts and {len(self.class_names)} names of {self.num_classes} classes"
            )
        for weights in (self.model, self.best or {}, self.average or {}):
            for name, value in weights.items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"{name} of the network must be a tensor, got {type(value)}")
        if (self.average is None) != (self.config.ema is None):
            raise ValueError(
                f"ema is {self.config.ema}, and there is {'no' if self.average is None else 'an'} average of "
                "the weights"
            )

    def check_data(self, data: LongTailData, *, splits: Collection[str] | None = None) -> None:
        """Raise :class:`CheckpointError` if the run had other data than ``data``.

        The contents of every split decide, wherever the files lie. Runs of older versions know only
        which images formed the training set. Classes of a set that has changed may be numbered in
        another way.

        Args:
            data: the data set.
            splits: splits to compare, beside the names of the classes; None for all. The others are not
                read.
        """
        if self.contents:
            found = data.contents(splits=splits)
            changed = [
                part
                for part in {**self.contents, **found}
                if (splits is None or part in ("classes", *splits))
                and self.contents.get(part) != found.get(part)
            ]
            if changed:
                part = changed[0]
                what = "the class names" if part == "classes" else f"the {part} images"
                raise CheckpointError(
                    f"{what} of {data.name} are not those of this run: SHA-256 "
                    f"{self.contents.get(part)} there, {found.get(part)} here; restore them, or "
                    "train again"
                )
        elif self.subset_hash not in (None, data.subset_hash):
            raise CheckpointError(
                f"the training set of {data.name} is not the one of this run: SHA-256 "
                f"{self.subset_hash} there, {data.subset_hash} here; restore its files or lists, "
                "or train again"
            )

    def describe_classes(self, data: LongTailData) -> None:
        """Take names, counts and groups of the classes from ``data``."""
        self.class_names = list(data.class_names)
        self.counts = data.counts.tolist()
        self.groups = data.group_lists()

    @property
    def judged_epoch(self) -> int:
        """Epochs of training behind :meth:`judged_weights`."""
        return self.epoch if self.best is None else best_epoch(self.history)

    @property
    def rule(self) -> str:
        """Which weights :meth:`judged_weights` are; see :attr:`fastsam.longtail.Result.rule`."""
        return judged_rule(
            self.history,
            selects=self.best is not None,
            decay=self.config.ema,
            parent=self.parent,
        )

    def judged_weights(self) -> dict[str, Any]:
        """State of the network that the result of the run judges.

        It is that of the best epoch on validation where the run selects it, else the average of the weights
        where the run has one, else the state after the last epoch.
        """
        if self.best is not None:
            return self.best
        return self.model if self.average is None else self.average

    def build_model(self, judged: bool = False) -> Classifier:
        """The network with the stored weights.

        Args:
            judged: use :meth:`judged_weights` instead of the weights after the last epoch.

        Raises:
            CheckpointError: if the weights are not of the network that the settings name, or are
                infinite or NaN.
        """
        model = self._network(self.judged_weights() if judged else self.model)
        spoiled = not_finite(model)
        if spoiled is not None:
            raise CheckpointError(f"the weights are not finite, {spoiled} for one; train again")
        return model

    def check_judged(self) -> None:
        """Raise :class:`CheckpointError` if the best weights, or their average, are not of the network."""
        for weights in (self.best, self.average):
            if weights is not None:
                self._network(weights)

    def _network(self, weights: dict[str, Any]) -> Classifier:
        config = self.config
        model = build_network(config, self.num_classes, self.channels)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"the weights are not of a {config.model} with {self.num_classes} classes: {reason}"
            ) from error
        return model

    def load_optimizer(self, optimizer: Optimizer) -> None:
        """Give ``optimizer``, newly built for the same settings, the stored state.

        Raises:
            CheckpointError: if the state is of other parameters or of another optimizer.
        """
        try:
            _check_state(self.optimizer, optimizer)
            optimizer.load_state_dict(self.optimizer)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"the state of the optimizer is not of {self.config.optimizer} on this network: {error}"
            ) from error


def checkpoint_bytes(config: TrainConfig, model: nn.Module) -> int:
    """Estimate the size of a checkpoint file of a run.

    Args:
        config: settings of the run.
        model: its network.
    """
    state = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    copies = config.parts["optimizer"].state_copies()
    states = 1 + (config.select != "last") + (config.ema is not None)
    return int(states * state + copies * trained + (1 << 16))


_SCHEDULED = ("lr", "rho", "attempted_steps", "steps_taken", "params")
"""What differs between the groups of a new optimizer and of one that has made steps."""


def _check_state(stored: dict[str, Any], optimizer: Optimizer) -> None:
    """Raise ValueError unless a state dict has the groups, settings and shapes of ``optimizer``."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    groups = stored["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if indices != list(range(len(parameters))):
        raise ValueError(f"it has {len(indices)} parameters of {len(parameters)}")
    for kept, group in zip(groups, optimizer.param_groups, strict=True):
        for name, value in group.items():
            if name not in _SCHEDULED and name in kept and kept[name] != value:
                raise ValueError(f"{name} is {kept[name]!r:.60} there and {value!r:.60} here")
    for index, entry in stored["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape not in ((), parameters[index].shape):
                raise ValueError(
                    f"{name} of parameter {index} has shape {tuple(value.shape)}, the parameter "
                    f"{tuple(parameters[index].shape)}"
                )


def _read(path: Path) -> Any:
    """The content of an archive of torch whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damage shows as any of a dozen types of exception.
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds objects other than data"
        raise DamagedError(
            f"{path} cannot be read as a checkpoint: it is truncated, damaged or not written by "
            f"fastsam ({reason})"
        ) from error


@contextmanager
def _checksums() -> Iterator[None]:
    """Have ``torch.save`` write the checksums that :func:`_read` verifies, its default."""
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(before)
