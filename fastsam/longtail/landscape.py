"""Hessian spectra of the loss of single classes, at the weights of a trained network.

A negative eigenvalue indicates a saddle point only where the gradient is small, and with batch normalization
the curvature depends on the scale of the weights. Report loss, gradient norm and weight norm with every
eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.curvature import Spectrum, spectral_density
from fastsam.curvature.lanczos.checkpoint import LanczosCheckpoint
from fastsam.curvature.operators.model import run_dtype
from fastsam.files import locked
from fastsam.longtail.build import augmented
from fastsam.longtail.checkpoint import Checkpoint, weights_hash
from fastsam.longtail.class_loss import ClassReader, class_loss
from fastsam.longtail.data import Images, LongTailData
from fastsam.longtail.errors import CheckpointError, DataError, LongTailError, UsageError, unknown
from fastsam.longtail.models.classifier import Classifier
from fastsam.records import build
from fastsam.stopping import Stopped, StopRequest
from fastsam.text import notice

LOSS_CHOICES = ("ce", "as-trained")
REDRAWN = "redrawn"
ALL: Final = "all"
"""Name that selects the images of all classes instead of one class."""


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

    def path(self, folder: str | Path) -> Path:
        """Return the path of the file of this spectrum in ``folder``."""
        return ClassSpectrum.path(folder, self.label, self.split, self.loss, self.augment)


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
        """Smallest and largest ``|lambda_min / lambda_max|`` within the Ritz residual bounds.

        Both are NaN if lambda_max is 0 and its bound too.
        """
        low, high = self.spectrum.lambda_min, self.spectrum.lambda_max
        low_error, high_error = self.spectrum.lambda_min_residual, self.spectrum.lambda_max_residual
        if high == high_error == 0:
            return math.nan, math.nan
        largest = abs(high) - high_error
        upper = (abs(low) + low_error) / largest if largest > 0 else math.inf
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
        path = self.subject.path(folder)
        settings = {**self.spectrum.settings, "subject": asdict(self.subject)}
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
    epoch: int | None = None,
    split: str = "train",
    loss: str = "ce",
    augment: str = "none",
    steps: int = 80,
    probes: int = 1,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    stop: StopRequest | None = None,
    progress: bool = True,
) -> list[ClassSpectrum]:
    """Compute the Hessian spectra of the mean loss of single classes at the weights of ``model``.

    The Hessian is that of all weights, whether they were trained or frozen.

    With ``out``, the same call continues after an interruption at any moment: it loads finished spectra and
    continues an unfinished one from its Lanczos steps, with the same bits.

    Args:
        model: the trained network.
        data: the data set of the run.
        checkpoint: checkpoint of the run, for its settings and loss.
        classes: labels of the classes; ``all`` for the mean loss over the images of all classes.
        epoch: epoch of the weights, for the description; None for that of the checkpoint.
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
        out: folder to which each spectrum is saved when it is finished; see :meth:`ClassSpectrum.path`. An
            unfinished spectrum has a folder with its Lanczos steps there. None: nothing is saved.
        overwrite: whether to remove existing spectra of these classes from ``out`` first.
        stop: from :func:`fastsam.stopping.stop_signals`: after a signal the Lanczos step is finished and
            saved, and :class:`fastsam.stopping.Stopped` is raised. None leaves signals as they are.
        progress: show progress: a bar on a terminal, one line per minute elsewhere.

    Raises:
        UsageError: if a name or number is not valid.
        DataError: if a class has no image in the split, its curvature is below the resolution of ``dtype``,
            the spectrum cannot be computed, for instance because memory is short, or the unfinished spectrum
            in ``out`` is damaged or has other settings.
        CheckpointError: if ``data`` is not the data set of the run, or a spectrum in ``out`` has other
            settings.
        FolderBusyError: if another process writes to ``out``.
        OSError: if ``out`` cannot be written to.
    """
    check_options(loss=loss, augment=augment, steps=steps, probes=probes, seed=seed)
    classes = list(classes)
    if not classes:
        raise UsageError(
            f"classes is empty; pass labels from 0 to {data.num_classes - 1}, or {ALL!r}"
        )
    checkpoint.check_data(data)
    draws = _draws(augment)
    config, device = checkpoint.config, next(model.parameters()).device
    images = augmented(config, data).split(split)
    settings = {
        "steps": steps,
        "probe_indices": list(range(probes)),
        "seed": seed,
        "dtype": str(dtype or _widest_dtype(model)).removeprefix("torch."),
        "weights": weights_hash(model.state_dict()),
    }
    members = [_members(data, images, label, split) for label in classes]
    options = {"split": split, "loss": loss, "augment": augment}
    subjects = [
        _subject(data, checkpoint, label, len(chosen), epoch=epoch, **options)
        for label, chosen in zip(classes, members, strict=True)
    ]
    spectra = []
    with nullcontext() if out is None else locked(Path(out)):
        if out is not None and overwrite:
            for subject in subjects:
                _remove(subject.path(out))
        # All of them first: other settings are an error before anything is computed.
        stored = [None if out is None else _stored(subject, out, settings) for subject in subjects]
        for subject, chosen, item in zip(subjects, members, stored, strict=True):
            state = None if out is None else _unfinished(subject.path(out))
            if item is None:
                try:
                    if stop is not None:
                        stop.check()
                    spectrum = spectral_density(
                        model,
                        class_loss(loss, config, data, model),
                        ClassReader(images, chosen, draws, seed, device),
                        # Also those that a head does not train.
                        params=[name for name, _ in model.named_parameters()],
                        steps=steps,
                        probes=probes,
                        seed=seed,
                        dtype=dtype,
                        # Keeping the graph would reuse the augmentation of the first product.
                        strategy="rebuild" if draws is None else "auto",
                        verify_data=draws is not None,
                        checkpoint=state,
                        stop=stop,
                        progress=progress,
                        description=subject.whose,
                    )
                except LongTailError:
                    raise
                except ValueError as error:
                    raise DataError(f"spectrum of {subject.whose}: {error}") from error
                except Stopped as stopped:
                    again = " without --overwrite" if overwrite and out is not None else ""
                    raise Stopped(f"spectrum of {subject.whose}: {stopped}{again}") from stopped
                item = ClassSpectrum(
                    subject, replace(spectrum, settings={**spectrum.settings, **settings})
                )
                if out is not None:
                    item.save(out)
            if state is not None:
                LanczosCheckpoint.remove(state)
            spectra.append(item)
    return spectra


def stored_spectra(
    out: str | Path,
    classes: Iterable[int | Literal["all"]],
    *,
    split: str,
    loss: str,
    augment: str,
) -> list[Path]:
    """Return the files and folders of finished and unfinished spectra that :func:`landscape` continues."""
    paths = [ClassSpectrum.path(out, label, split, loss, augment) for label in classes]
    return [path for file in paths for path in (file, _unfinished(file)) if path.exists()]


def _unfinished(path: Path) -> Path:
    """Return the folder of the Lanczos steps of a spectrum that will be saved to ``path``."""
    return path.with_suffix(".lanczos")


def _remove(path: Path) -> None:
    """Remove a spectrum, finished or not."""
    LanczosCheckpoint.remove(_unfinished(path))
    path.unlink(missing_ok=True)


def _stored(
    subject: Subject, out: str | Path, settings: Mapping[str, object]
) -> ClassSpectrum | None:
    """Load a finished spectrum; return None if there is none or it is damaged.

    Raises:
        CheckpointError: if it has other settings.
    """
    path = subject.path(out)
    if not path.is_file():
        return None
    try:
        item = ClassSpectrum.load(path)
    except DataError as error:
        notice(f"{error}; creating it again")
        return None
    found = {**item.spectrum.settings, **asdict(item.subject)}
    for name, value in {**settings, **asdict(subject)}.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"{path} contains another spectrum: {name} was {found.get(name, 'not recorded')}, is now "
                f"{value}; use the same settings, choose another --out, or replace it with --overwrite"
            )
    return item


def _subject(
    data: LongTailData,
    checkpoint: Checkpoint,
    label: int | Literal["all"],
    images: int,
    *,
    split: str,
    loss: str,
    augment: str,
    epoch: int | None,
) -> Subject:
    groups = (name for name, labels in data.groups.items() if label in labels)
    return Subject(
        run=f"{checkpoint.config.method} {checkpoint.config.optimizer}",
        epoch=checkpoint.epoch if epoch is None else epoch,
        label=None if isinstance(label, str) else label,
        name=ALL if isinstance(label, str) else data.class_names[label],
        group=ALL if isinstance(label, str) else next(groups, "none"),
        images=images,
        split=split,
        loss=loss,
        augment=augment,
    )


def _widest_dtype(model: Classifier) -> torch.dtype:
    """Return the dtype that a spectrum has by default."""
    return run_dtype(model, [name for name, _ in model.named_parameters()], None)


def check_options(*, loss: str, augment: str, steps: int, probes: int, seed: int = 0) -> None:
    """Raise :class:`UsageError` for options that :func:`landscape` rejects whatever the data are."""
    if loss not in LOSS_CHOICES:
        raise unknown("loss", loss, LOSS_CHOICES)
    for name, value, low in (("steps", steps, 1), ("probes", probes, 1), ("seed", seed, 0)):
        if not low <= value < 1 << 63:
            raise UsageError(f"{name} must be at least {low} and below 2^63, got {value}")
    _draws(augment)


def _members(
    data: LongTailData, images: Images, label: int | Literal["all"], split: str
) -> NDArray[np.int64]:
    """Return the indices of the images of a class, or of all images."""
    if isinstance(label, str):
        return np.arange(len(images))
    if not 0 <= label < data.num_classes:
        raise unknown("class", label, (f"0 to {data.num_classes - 1}", ALL))
    members = np.flatnonzero(images.targets == label)
    if len(members) == 0:
        raise DataError(f"class {label} has no image in the {split} set of {data.name}")
    return members


def _draws(augment: str) -> int | None:
    """Return the number of fixed copies of each image: 0 for clean images, None for ``redrawn``."""
    if augment == "none":
        return 0
    if augment == REDRAWN:
        return None
    if augment.isdecimal() and len(augment) <= 4 and int(augment) >= 1:
        return int(augment)
    raise unknown("augment", augment, ("none", "a number of fixed copies up to 9999", REDRAWN))
