"""Checkpoints: the state of a training run on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam.longtail.archive import read_archive, write_archive
from fastsam.longtail.build import build_network
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData, Preprocessing
from fastsam.longtail.errors import CheckpointError
from fastsam.longtail.finite import not_finite
from fastsam.longtail.models import Classifier
from fastsam.longtail.results import Epoch, best_epoch, judged_rule
from fastsam.longtail.sharding import sharded_state
from fastsam.records import build

FORMAT = "fastsam-longtail"
VERSION = 3
"""Version of new checkpoints."""
CONTINUABLE = (2, VERSION)
"""Versions from which training can continue. Version 2 was written at the end of an epoch only."""
READABLE = (1, *CONTINUABLE)
"""Versions that can be evaluated and predicted with. Version 1 drew augmentation differently."""


@dataclass(eq=False)
class Checkpoint:
    """State of a run, from which training is resumed and trained networks are loaded.

    Attributes:
        config: settings of the run.
        epoch: number of completed epochs.
        channels: channels of the input images.
        num_classes: number of classes.
        model: state dict of the network.
        optimizer: state dict of the optimizer.
        history: one record per completed epoch.
        best: state dict of the evaluated network after the best epoch on validation; None unless
            ``config.select`` is ``best-validation``.
        unreadable: names of unreadable images that were skipped so far, with how often.
        sources: source of each setting, by name.
        subset_hash: SHA-256 of the training set.
        contents: SHA-256 of images and labels of every split, and of the class names; empty in runs of
            older versions.
        steps_per_epoch: batches per epoch; None in runs of older versions.
        parent: run and epoch from which this run branched off; None for other runs.
        start: weights that the run started from, with their SHA-256; None for random initial weights.
        class_names: one name per class; empty in runs of older versions.
        counts: training images of each class; empty in runs of older versions.
        groups: classes of head, mid and tail; empty in runs of older versions.
        size: height and width of the network's input; None in runs of older versions.
        average: state dict of the network with averaged weights; None in runs without ``ema``.
        preprocessing: how an image file becomes the network's input; None if that is unknown, and in
            runs of older versions.
        curvature: state of the :class:`fastsam.curvature.CurvatureTracker`; None in runs without one.
        loss_scale: state of the loss scale; None in runs whose precision is not float16.
        world_size: number of processes that trained the run last.
        keep: epochs whose checkpoint the run keeps.
        unfinished: state of an epoch between two of its steps; None after a whole epoch. See
            :mod:`fastsam.longtail.training.unfinished`.
        version: version of the file format and of the random numbers of training.
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
    size: tuple[int, int] | None = None
    sources: dict[str, str] = field(default_factory=dict)
    subset_hash: str | None = None
    contents: dict[str, str] = field(default_factory=dict)
    steps_per_epoch: int | None = None
    parent: dict[str, Any] | None = None
    start: dict[str, Any] | None = None
    class_names: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    average: dict[str, Any] | None = None
    preprocessing: Preprocessing | None = None
    curvature: dict[str, Any] | None = None
    loss_scale: dict[str, Any] | None = None
    world_size: int = 1
    keep: tuple[int, ...] = ()
    unfinished: dict[str, Any] | None = None
    version: int = VERSION

    def save(self, path: str | Path) -> None:
        """Write the checkpoint atomically: a crash leaves the previous file intact.

        Raises:
            OSError: if the file cannot be written; the message includes the required disk space.
        """
        write_archive(Path(path), self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Convert to the stored form: values that ``torch.load(weights_only=True)`` accepts."""
        return {
            **vars(self),
            "history": [asdict(record) for record in self.history],
            "config": self.config.as_dict(),
            "preprocessing": self.preprocessing and self.preprocessing.as_dict(),
            "format": FORMAT,
        }

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Load a checkpoint without executing code from it (``weights_only=True``).

        The checksums of the archive are verified first. Tensors are loaded to the CPU.

        Args:
            path: the file, or a folder that contains ``checkpoint.pt``.

        Raises:
            DamagedError: if the file is damaged or is not a torch archive.
            CheckpointError: if the file is missing, has another format or an unsupported version, or its
                fields contradict each other.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "checkpoint.pt"
        if not path.is_file():
            if path.name == "checkpoint.pt" and (path.parent / "run.yaml").is_file():
                raise CheckpointError(
                    f"the run in {path.parent} is not finished; `fastsam train --resume --out {path.parent}` "
                    "continues it"
                )
            raise CheckpointError(
                f"no checkpoint at {path}; pass the folder of a run, in which `fastsam train --out DIR` "
                "wrote checkpoint.pt"
            )
        return cls.from_dict(read_archive(path), path)

    @classmethod
    def from_dict(cls, content: Any, path: str | Path) -> Checkpoint:
        """Create a checkpoint from the result of :meth:`as_dict`, also of older versions.

        Args:
            content: the stored form.
            path: where it was stored, for messages.

        Raises:
            CheckpointError: if it has another format or an unsupported version, or its fields contradict each
                other.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of `fastsam train`")
        version = content.get("version")
        if not isinstance(version, int) or version not in READABLE:
            raise CheckpointError(
                f"{path} has checkpoint version {version!r:.20}, but this version of fastsam reads "
                f"{', '.join(map(str, READABLE))}; install the version that wrote it"
            )
        known = cls.__dataclass_fields__
        try:
            fields = {name: content[name] for name in content if name in known}
            config = TrainConfig.from_dict(fields.pop("config", {}))
            checkpoint = build(cls, fields, config=config)
            checkpoint._check()
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not a valid checkpoint of this version of fastsam: {error}"
            ) from error
        return checkpoint

    def _check(self) -> None:
        """Raise ValueError if the fields contradict each other."""
        if [record.epoch for record in self.history] != list(range(1, self.epoch + 1)):
            raise ValueError(
                f"expected records of epochs 1 to {self.epoch} in the history, got {len(self.history)} "
                "records"
            )
        most = self.config.epochs - (self.unfinished is not None)
        if self.epoch > most:
            raise ValueError(f"epoch must be at most {most}, got {self.epoch}")
        if self.channels < 1 or self.num_classes < 2:
            raise ValueError(
                f"expected at least 1 channel and 2 classes, got {self.channels} and {self.num_classes}"
            )
        if len(self.counts) != len(self.class_names) or len(self.counts) not in (
            0,
            self.num_classes,
        ):
            raise ValueError(
                f"expected {self.num_classes} class counts and names, got {len(self.counts)} and "
                f"{len(self.class_names)}"
            )
        for weights in (self.model, self.best or {}, self.average or {}):
            for name, value in weights.items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"{name} of the network must be a tensor, got {type(value)}")
        if (self.average is None) != (self.config.ema is None):
            raise ValueError(
                f"ema is {self.config.ema}, but the file has {'no' if self.average is None else 'an'} "
                "average of the weights"
            )

    def check_data(self, data: LongTailData, *, splits: Collection[str] | None = None) -> None:
        """Check that ``data`` has the images and classes of this run, by SHA-256.

        The location of the files does not matter. Checkpoints of older versions have only the hash of the
        training set. In a changed data set the same label may mean another class.

        Args:
            data: the data set.
            splits: splits to compare, in addition to the class names; None for all. Other splits are not
                read.

        Raises:
            CheckpointError: if images or class names differ.
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
                    f"{what} of {data.name} have changed since this run: SHA-256 was "
                    f"{self.contents.get(part)}, is {found.get(part)}; restore the data set or train again"
                )
        elif self.subset_hash not in (None, data.subset_hash):
            raise CheckpointError(
                f"the training set of {data.name} has changed since this run: SHA-256 was "
                f"{self.subset_hash}, is {data.subset_hash}; restore its files or lists, or train again"
            )

    def check_continues(self) -> None:
        """Check that training can continue from this checkpoint, by resuming or in a branch.

        Raises:
            CheckpointError: if it has an older version.
        """
        if self.version not in CONTINUABLE:
            raise CheckpointError(
                "the run was trained by a version of fastsam that drew augmentation differently, so its "
                "training cannot continue; train again (--overwrite)"
            )

    def describe_classes(self, data: LongTailData) -> None:
        """Copy names, counts and groups of the classes from ``data``."""
        self.class_names = list(data.class_names)
        self.counts = data.counts.tolist()
        self.groups = data.group_lists()

    @property
    def judged_epoch(self) -> int:
        """Number of epochs after which :meth:`judged_weights` were saved."""
        return self.epoch if self.best is None else best_epoch(self.history)

    @property
    def rule(self) -> str:
        """How :meth:`judged_weights` were selected; see :attr:`fastsam.longtail.Result.rule`."""
        return judged_rule(
            self.history,
            selects=self.best is not None,
            decay=self.config.ema,
            parent=self.parent,
        )

    def check_whole(self, path: str | Path) -> None:
        """Raise :class:`CheckpointError` if this is a checkpoint within an epoch, read from ``path``."""
        if self.unfinished is not None:
            raise CheckpointError(
                f"{path} is a checkpoint within an epoch, from which only training continues; pass the "
                "folder of the run"
            )

    def judged_weights(self) -> dict[str, Any]:
        """Return the state dict of the network that the run evaluates on the test set.

        These are the weights after the best epoch on validation if the run selects it, else the averaged
        weights if the run has them, else the weights after the last epoch.
        """
        if self.best is not None:
            return self.best
        return self.model if self.average is None else self.average

    def build_model(self, judged: bool = False, *, module: nn.Module | None = None) -> Classifier:
        """Create the network and load the stored weights.

        Args:
            judged: use :meth:`judged_weights` instead of the weights after the last epoch.
            module: your module for a network ``own:NAME``. It is copied.

        Raises:
            CheckpointError: if the weights do not fit the network of the settings, or are infinite or NaN.
        """
        model = self._network(self.judged_weights() if judged else self.model, module)
        spoiled = not_finite(model)
        if spoiled is not None:
            raise CheckpointError(
                f"the weights contain infinite or NaN values, for instance in {spoiled}; train again"
            )
        return model

    def check_judged(self, *, module: nn.Module | None = None) -> None:
        """Raise :class:`CheckpointError` if the best or averaged weights do not fit the network."""
        for weights in (self.best, self.average):
            if weights is not None:
                self._network(weights, module)

    def _network(self, weights: dict[str, Any], module: nn.Module | None) -> Classifier:
        config = self.config
        model = build_network(
            config, self.num_classes, self.channels, size=self.size, module=module
        )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"the weights do not fit a {config.model} with {self.num_classes} classes: {reason}"
            ) from error
        return model

    def load_optimizer(self, optimizer: Optimizer) -> None:
        """Load the stored state into ``optimizer``, which must be built from the same settings.

        Raises:
            CheckpointError: if the state belongs to other parameters or another optimizer.
        """
        try:
            _check_state(self.optimizer, optimizer)
            parameters = [value for group in optimizer.param_groups for value in group["params"]]
            optimizer.load_state_dict(sharded_state(self.optimizer, parameters))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"the stored optimizer state does not fit {self.config.optimizer} on this network: {error}"
            ) from error


def checkpoint_bytes(config: TrainConfig, model: nn.Module) -> int:
    """Estimate the size of a run's checkpoint file in bytes.

    Args:
        config: settings of the run.
        model: network of the run.
    """
    state = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    parts = (config.parts.get(kind) for kind in ("optimizer", "base_optimizer"))
    copies = sum(part.state_copies() for part in parts if part is not None)
    states = 1 + (config.select != "last") + (config.ema is not None)
    if config.track_curvature is not None:  # two eigenvectors
        copies += 2 * len(config.curvature_classes)
    return int(states * state + copies * trained + (1 << 16))


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and values of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        content = value.detach().cpu().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
        digest.update(name.encode() + content.numpy().tobytes())
    return digest.hexdigest()


_SCHEDULED = ("lr", "rho", "attempted_steps", "steps_taken", "params")
"""Group options that may differ between a new optimizer and one that has made steps."""


def _check_state(stored: dict[str, Any], optimizer: Optimizer) -> None:
    """Raise ValueError unless a state dict has the groups, settings and shapes of ``optimizer``."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    groups = stored["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if indices != list(range(len(parameters))):
        raise ValueError(f"expected {len(parameters)} parameters, got {len(indices)}")
    for kept, group in zip(groups, optimizer.param_groups, strict=True):
        for name, value in group.items():
            if name not in _SCHEDULED and name in kept and kept[name] != value:
                raise ValueError(f"expected {name} {value!r:.60}, got {kept[name]!r:.60}")
    for index, entry in stored["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape not in ((), parameters[index].shape):
                raise ValueError(
                    f"expected {name} of parameter {index} to have shape {tuple(parameters[index].shape)}, "
                    f"got {tuple(value.shape)}"
                )
