"""Hessian spectra of the loss of single classes, at the weights of a trained network.

A negative eigenvalue indicates a saddle point only where the gradient is small, and with batch normalization
the curvature depends on the scale of the weights. Report loss, gradient norm and weight norm with every
eigenvalue.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsam.curvature import BatchLoss, Spectrum, spectral_density
from fastsam.longtail.build import build_objective
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import Batch, Draw, Images, LongTailData
from fastsam.longtail.errors import DataError, LongTailError, UsageError, unknown
from fastsam.longtail.losses import CrossEntropyLoss
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.objective import Given, Term
from fastsam.records import build

LOSS_CHOICES = ("ce", "as-trained")
REDRAWN = "redrawn"
ALL: Final = "all"
"""Name that selects the images of all classes instead of one class."""
_BATCH = 256


@dataclass(frozen=True)
class Subject:
    """Description of a class spectrum: run, class, images, loss and augmentation.

    Attributes:
        run: method and optimizer of the run, separated by a space.
        epoch: number of epochs after which the weights were saved.
        label: label of the class; None for all classes together.
        name: name of the class.
        group: head, mid or tail.
        images: number of images of the class in the split.
        split: ``train``, ``validation`` or ``test``.
        loss: ``ce`` for unweighted cross-entropy, ``as-trained`` for the loss of the last epoch.
        augment: ``none``; the number of fixed augmented copies of each image; or ``redrawn`` for a new
            augmentation at every product, which is not a valid operator.
    """

    run: str
    epoch: int
    label: int | None
    name: str
    group: str
    images: int
    split: str
    loss: str
    augment: str

    @property
    def title(self) -> str:
        """All attributes on one line."""
        augment = {
            "none": "no augmentation",
            REDRAWN: "new augmentation at every product",
        }.get(self.augment, f"{self.augment} fixed augmented copies of each image")
        return (
            f"{self.run}, epoch {self.epoch}, {self.whose} ({self.of}), loss {self.loss}, {augment}"
        )

    @property
    def whose(self) -> str:
        """``class NAME``, or ``all classes``."""
        return "all classes" if self.label is None else f"class {self.name}"

    @property
    def of(self) -> str:
        """Group, number of images and split."""
        images = f"{self.images} {self.split} images"
        return images if self.label is None else f"{self.group}, {images}"


@dataclass(frozen=True, eq=False)
class ClassSpectrum:
    """A Hessian spectrum with its description.

    Attributes:
        subject: run, class, split, loss and augmentation.
        spectrum: the spectrum.
    """

    subject: Subject
    spectrum: Spectrum

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Smallest and largest ``|lambda_min / lambda_max|`` within the Ritz residual bounds."""
        low, high = self.spectrum.lambda_min, self.spectrum.lambda_max
        low_error, high_error = self.spectrum.lambda_min_residual, self.spectrum.lambda_max_residual
        largest = abs(high) - high_error
        upper = (abs(low) + low_error) / largest if largest > 0 else float("inf")
        return max(abs(low) - low_error, 0.0) / (abs(high) + high_error), upper

    @staticmethod
    def path(
        folder: str | Path, label: int | Literal["all"] | None, split: str, loss: str, augment: str
    ) -> Path:
        """Return the path that :meth:`save` writes: ``folder/class-LABEL-SPLIT-LOSS-AUGMENT.json``."""
        name = f"class-{ALL if label is None else label}-{split}-{loss}-{augment}.json"
        return Path(folder, name)

    def save(self, folder: str | Path) -> Path:
        """Write spectrum and description to a file in ``folder``, and return its path."""
        subject = self.subject
        path = self.path(folder, subject.label, subject.split, subject.loss, subject.augment)
        settings = {**self.spectrum.settings, "subject": asdict(subject)}
        replace(self.spectrum, settings=settings).save(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> ClassSpectrum:
        """Read a file written by :meth:`save`.

        Raises:
            DataError: if the file is not a class spectrum.
        """
        try:
            spectrum = Spectrum.load(path)
            return cls(build(Subject, spectrum.settings["subject"]), spectrum)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not a class spectrum: {error}") from error


def landscape(
    model: Classifier,
    data: LongTailData,
    checkpoint: Checkpoint,
    classes: Iterable[int | Literal["all"]],
    *,
    split: str = "train",
    loss: str = "ce",
    augment: str = "none",
    steps: int = 80,
    probes: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[ClassSpectrum]:
    """Compute the Hessian spectra of the mean loss of single classes at the weights of ``model``.

    Args:
        model: the trained network.
        data: the data set of the run.
        checkpoint: checkpoint of the run, for its settings and loss.
        classes: labels of the classes; ``all`` for the mean loss over the images of all classes.
        split: dataset split: ``train``, ``validation`` or ``test``.
        loss: ``ce`` for unweighted cross-entropy (of scaled cosines after LDAM), ``as-trained`` for
            the loss of the last epoch.
        augment: ``none`` for clean images; a number K for K fixed augmented copies of each image; or
            ``redrawn`` for a new augmentation at every product, as in published tools. With ``redrawn`` the
            products do not belong to one Hessian, and their noise drives the extremes towards symmetry.
        steps: Lanczos steps, at least 1.
        probes: number of random start vectors, at least 1.
        seed: seed of start vectors and augmentation.
        dtype: float32 or float64, precision of weights, images and products; None for the weights' dtype.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        UsageError: if a name or number is not valid.
        DataError: if a class has no image in the split, its curvature is below the resolution of ``dtype``,
            or the spectrum cannot be computed, for instance because memory is short.
        CheckpointError: if ``data`` is not the data set of the run.
    """
    check_options(loss=loss, augment=augment, steps=steps, probes=probes, seed=seed)
    classes = list(classes)
    if not classes:
        raise UsageError(
            f"classes is empty; pass labels from 0 to {data.num_classes - 1}, or {ALL!r}"
        )
    checkpoint.check_data(data)
    draws = _draws(augment)
    images = data.split(split)
    config = checkpoint.config
    spectra = []
    for label in classes:
        members = _members(data, images, label)
        if len(members) == 0:
            raise DataError(f"class {label} has no image in the {split} set of {data.name}")
        reader = _ClassReader(images, members, draws, seed, next(model.parameters()).device)
        groups = (name for name, labels in data.groups.items() if label in labels)
        subject = Subject(
            run=f"{config.method} {config.optimizer}",
            epoch=checkpoint.epoch,
            label=None if isinstance(label, str) else label,
            name=ALL if isinstance(label, str) else data.class_names[label],
            group=ALL if isinstance(label, str) else next(groups, "none"),
            images=len(members),
            split=split,
            loss=loss,
            augment=augment,
        )
        try:
            spectrum = spectral_density(
                model,
                class_loss(loss, config, data, model),
                reader,
                steps=steps,
                probes=probes,
                seed=seed,
                dtype=dtype,
                # Keeping the graph would reuse the augmentation of the first product.
                strategy="rebuild" if draws is None else "auto",
                verify_data=draws is not None,
                progress=progress,
                description=subject.whose,
            )
        except LongTailError:
            raise
        except ValueError as error:
            raise DataError(f"spectrum of {subject.whose}: {error}") from error
        spectra.append(ClassSpectrum(subject, spectrum))
    return spectra


def check_options(*, loss: str, augment: str, steps: int, probes: int, seed: int = 0) -> None:
    """Raise :class:`UsageError` for options that :func:`landscape` rejects whatever the data are."""
    if loss not in LOSS_CHOICES:
        raise unknown("loss", loss, LOSS_CHOICES)
    for name, value, low in (("steps", steps, 1), ("probes", probes, 1), ("seed", seed, 0)):
        if not low <= value < 1 << 63:
            raise UsageError(f"{name} must be at least {low} and below 2^63, got {value}")
    _draws(augment)


def _members(data: LongTailData, images: Images, label: int | Literal["all"]) -> NDArray[np.int64]:
    """Return the indices of the images of a class, or of all images."""
    if isinstance(label, str):
        return np.arange(len(images))
    if not 0 <= label < data.num_classes:
        raise unknown("class", label, (f"0 to {data.num_classes - 1}", ALL))
    return np.flatnonzero(images.targets == label)


def _draws(augment: str) -> int | None:
    """Return the number of fixed copies of each image: 0 for clean images, None for ``redrawn``."""
    if augment == "none":
        return 0
    if augment == REDRAWN:
        return None
    if augment.isdecimal() and len(augment) <= 4 and int(augment) >= 1:
        return int(augment)
    raise unknown("augment", augment, ("none", "a number of fixed copies up to 9999", REDRAWN))


@dataclass(eq=False)
class _ClassReader:
    """The images of one class as an iterable of ``(inputs, targets)`` batches."""

    images: Images
    members: Any
    draws: int | None
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self._fresh = itertools.count(1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        cuts = range(_BATCH, len(self.members), _BATCH)
        order = np.array_split(self.members, cuts)
        if self.draws == 0:
            epochs: Iterable[int] = (0,)
        elif self.draws is None:
            epochs = (next(self._fresh),)
        else:
            epochs = range(1, self.draws + 1)
        for epoch in epochs:
            for batch in self.images.batches(
                order, Draw(self.seed, epoch) if epoch > 0 else None, self.device
            ):
                yield batch.inputs, batch.targets


def class_loss(
    name: str, config: TrainConfig, data: LongTailData, model: Classifier
) -> nn.Module | BatchLoss:
    """Return cross-entropy (``ce``) or the loss of the last epoch, in a form that a spectrum can average."""
    objective = build_objective(config, data.counts, device=next(model.parameters()).device)
    scale = objective.logit_scale if name == "ce" else 1.0
    if name == "ce" and scale == 1.0:
        return nn.CrossEntropyLoss()
    term: Term = CrossEntropyLoss()
    if name != "ce":
        terms = objective.at(config.epochs)
        if objective.couples_batch or len(terms) != 1:
            raise UsageError(
                f"loss 'as-trained' requires a mean over samples, which the loss of {config.method} is not; "
                "pass --loss ce"
            )
        term = terms[0][0].eval()

    def sums(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        features = model.features(inputs)
        outputs = Outputs(features, scale * model.head(features))
        part = Batch((inputs,), targets, targets)
        losses = term.loss(outputs, part, Given(model))
        return losses, term.divisor(part).to(losses)

    return BatchLoss(sums)
