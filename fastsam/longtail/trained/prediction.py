"""Predictions of a trained run for image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsam.longtail.data.catalog import Corrupt
from fastsam.longtail.data.files import CORRUPT_POLICIES
from fastsam.longtail.data.lists import files_below
from fastsam.longtail.data.pixels import SUFFIXES
from fastsam.longtail.data.preprocessing import Preprocessing, Views
from fastsam.longtail.data.workers import lost_workers_named, prepare_worker
from fastsam.longtail.errors import DataError, LongTailError, UsageError, unknown
from fastsam.longtail.precision import autocast, float32_products
from fastsam.longtail.predictions import view_logits
from fastsam.longtail.trained.run import TrainedRun
from fastsam.text import notice
from fastsam.upload import upload


@dataclass(frozen=True, eq=False)
class FilePrediction:
    """The prediction for one image file.

    Attributes:
        path: path of the file.
        probabilities: probability of each class, float32 ``[C]``.
    """

    path: Path
    probabilities: NDArray[np.float32]

    @property
    def label(self) -> int:
        """Label of the most probable class."""
        return int(self.probabilities.argmax())

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return float(self.probabilities[self.label])

    def top(self, count: int) -> list[int]:
        """Return the labels of the ``count`` most probable classes, most probable first."""
        order = np.argsort(-self.probabilities, kind="stable")
        return [int(label) for label in order[:count]]


def predict_files(
    run: TrainedRun,
    paths: str | Path | Iterable[str | Path],
    *,
    batch_size: int = 64,
    workers: int = 0,
    corrupt: Corrupt = "stop",
    views: Views = 1,
) -> Iterator[FilePrediction]:
    """Predict the classes of image files with the preprocessing and the precision of the run.

    Files are read and predicted lazily, during iteration, so memory does not grow with their number.

    Args:
        run: the trained run.
        paths: image files and folders, or one of them. A folder is searched recursively, in sorted order,
            for the suffixes in :data:`fastsam.longtail.data.pixels.SUFFIXES`; hidden files are ignored.
        batch_size: images per batch.
        workers: number of worker processes that read files; 0 reads in this process.
        corrupt: what to do with an unreadable image: ``stop`` with an error, or ``skip`` it with a
            warning on standard error.
        views: number of crops of each image whose logits are averaged; see :func:`evaluate_run`.

    Returns:
        One prediction per image, in the order of the files.

    Raises:
        DataError: if the preprocessing of the run is unknown, a path does not exist, or a folder has no
            image. Raised during iteration: if an image cannot be read with ``stop``, or no image can be
            read with ``skip``.
        UsageError: if there are no paths, or an argument is out of range.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from fastsam.longtail import Trainer, recipe
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = Trainer(recipe("digits-lt", "ce", "sgd", epochs=1).config(), out=folder).fit()
        >>> Image.new("L", (8, 8)).save(folder / "black.png")
        >>> [found] = predict_files(TrainedRun.load(folder), [folder / "black.png"])
        >>> found.probabilities.shape, round(float(found.probabilities.sum()), 4)
        ((10,), 1.0)
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise UsageError(f"workers must be at least 0, got {workers}")
    if corrupt not in CORRUPT_POLICIES:
        raise unknown("corrupt", corrupt, CORRUPT_POLICIES)
    preprocessing = run.known_preprocessing().with_views(views)
    given = [paths] if isinstance(paths, str | Path) else paths
    files = image_files([Path(path) for path in given])
    loader: DataLoader[_Batch] = DataLoader(
        _Files(preprocessing),
        batch_size=None,  # the sampler yields batches, as lists of paths
        sampler=_Chunks(files, batch_size),
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=prepare_worker,
        # Without a generator the loader would advance torch's global generator.
        generator=torch.Generator(),
    )
    return _predictions(run, loader, corrupt)


def image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Find image files.

    Args:
        paths: files with any suffix, and folders, which are searched recursively in sorted order. Links to
            folders are followed.

    Raises:
        UsageError: if there are no paths.
        DataError: if a path does not exist, or a folder has no image. Raised during iteration: if a link
            leads to a folder above it.
    """
    if not paths:
        raise UsageError("no images to predict; pass image files or folders that contain images")
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{path} does not exist; pass image files or folders that contain images"
            )
    parts = []
    for path in paths:
        found = filter(_is_image, files_below(path)) if path.is_dir() else iter((path,))
        first = next(found, None)
        if first is None:
            raise DataError(
                f"{path} contains no image ({', '.join(SUFFIXES)}); pass image files or folders that "
                "contain images"
            )
        parts.append(chain((first,), found))
    return chain.from_iterable(parts)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


class _Chunks:
    """Splits paths into lists of at most ``size`` lazily."""

    def __init__(self, paths: Iterator[Path], size: int) -> None:
        self.paths = paths
        self.size = size

    def __iter__(self) -> Iterator[list[Path]]:
        while chunk := list(islice(self.paths, self.size)):
            yield chunk


class _Batch(NamedTuple):
    """Files of one batch, in order.

    Attributes:
        paths: files that could be read.
        inputs: preprocessed images, ``[B, C, H, W]`` or ``[B, views, C, H, W]``; None if B is 0.
        unreadable: files that could not be read, with the reason.
    """

    paths: list[Path]
    inputs: Tensor | None
    unreadable: list[tuple[Path, str]]


class _Files(Dataset[_Batch]):
    """Reads and preprocesses files in the workers."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __getitem__(self, paths: list[Path]) -> _Batch:
        read: list[Path] = []
        inputs: list[Tensor] = []
        unreadable: list[tuple[Path, str]] = []
        for path in paths:
            try:
                inputs.append(self.preprocessing.apply(path))
            except (OSError, ValueError) as error:
                unreadable.append((path, str(error)))
            else:
                read.append(path)
        return _Batch(read, torch.stack(inputs) if inputs else None, unreadable)


def _unchanged(batch: Any) -> Any:
    return batch


def _predictions(
    run: TrainedRun, batches: DataLoader[_Batch], corrupt: Corrupt
) -> Iterator[FilePrediction]:
    found = False
    with lost_workers_named():
        for batch in batches:
            for path, reason in batch.unreadable:
                if corrupt == "stop":
                    raise DataError(
                        f"cannot read {path} ({reason}); replace the file or pass --corrupt skip"
                    )
                notice(f"skipped unreadable image {path} ({reason})")
            if batch.inputs is not None:
                found = True
                yield from _predicted(run, batch.paths, batch.inputs)
    if not found:
        raise DataError(
            f"none of the images can be read; pass images in a supported format ({', '.join(SUFFIXES)})"
        )


def _predicted(run: TrainedRun, paths: list[Path], inputs: Tensor) -> list[FilePrediction]:
    # A generator must not yield inside inference_mode, which would stay on in the caller's code.
    config = run.checkpoint.config
    with (
        torch.inference_mode(),
        float32_products(config.tf32, run.device),
        autocast(config.precision, run.device),
    ):
        logits = view_logits(run.network, upload(inputs, run.device))
        probabilities = logits.softmax(dim=1).cpu()
    spoiled = (~probabilities.isfinite().all(dim=1)).nonzero()
    if len(spoiled):
        raise LongTailError(
            f"the network's outputs for {paths[int(spoiled[0])]} are infinite or NaN; check the image for "
            "such values"
        )
    rows = probabilities.numpy()
    return [FilePrediction(path, row) for path, row in zip(paths, rows, strict=True)]
