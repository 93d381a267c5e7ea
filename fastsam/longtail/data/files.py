"""Images that are read from files by CPU workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.longtail.data.augment import Compose, RandomHorizontalFlip
from fastsam.longtail.data.augmentations.base import Frame, Policy, Steps
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.content import content_hash, file_digests
from fastsam.longtail.data.device_part import DevicePart
from fastsam.longtail.data.encoded import Encoded, Located, Location
from fastsam.longtail.data.image_source import FileSource, GraySource, ImageSource
from fastsam.longtail.data.jitter import ColorJitter
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.data.pack import Pack
from fastsam.longtail.data.pixels import Reading
from fastsam.longtail.data.preprocessing import Preprocessing
from fastsam.longtail.data.resized_crop import RandomResizedCrop
from fastsam.longtail.data.scan import Scan, cached_scan, scan_files
from fastsam.longtail.data.workers import Reader, Request, Unreadable, Workers
from fastsam.longtail.errors import DataError, UsageError, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels of ImageNet, for pixels in [0, 1]."""
CORRUPT_POLICIES = ("stop", "skip")


@dataclass(frozen=True)
class Preparation:
    """Transforms from image files to tensors.

    Attributes:
        size: height and width of the network's input in pixels.
        mean: mean of each channel.
        std: standard deviation of each channel.
        jitter: strength of the brightness, contrast and saturation jitter in training.
        channels: 1 for grayscale, 3 for RGB.
    """

    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    jitter: float = 0.4
    channels: int = 3

    def per_image(self) -> RandomResizedCrop:
        """Return the part of the training augmentation that the workers make: a random resized crop."""
        return RandomResizedCrop(self.size)

    def per_batch(self) -> Compose:
        """Return the part that the device makes of whole batches: horizontal flip and color jitter."""
        return Compose((RandomHorizontalFlip(), ColorJitter(*(self.jitter,) * 3)))

    def steps(self) -> Steps:
        """Return the training augmentation: :meth:`per_image`, then :meth:`per_batch`."""
        return Steps(crop=self.per_image(), per_batch=self.per_batch())

    def evaluation(self, reading: Reading) -> Preprocessing:
        """Return the evaluation transform: resize the shorter side to 256/224 of the size, crop the center.

        Args:
            reading: handling of EXIF orientation and pixel values.
        """
        return Preprocessing(
            size=(self.size, self.size),
            channels=self.channels,
            mean=self.mean,
            std=self.std,
            resize=round(self.size * 256 / 224),
            exif=reading.exif,
            value_range=reading.value_range,
        )


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images that are read from a list of files.

    Workers decode, crop and resize; the device flips, jitters and normalizes whole batches. The augmentation
    of an image depends on the :class:`Draw` and the image, not on workers or ranks. Workers persist between
    epochs, until :meth:`close` is called or this object is deleted.

    Attributes:
        root: folder that the paths are relative to.
        images: paths and classes.
        preparation: transforms from files to tensors.
        workers: number of worker processes; 0 reads in this process.
        corrupt: ``stop`` raises an error at an unreadable image; ``skip`` skips it and counts it in
            ``unreadable``.
        reading: handling of EXIF orientation and pixel values.
        plain: preprocessing without augmentation; None for the one of ``preparation``.
        left_out: paths of unreadable images that :meth:`readable` removed.
        unreadable: how often each unreadable image was skipped, by path.
        known: cached hash of the contents of ``images`` and ``left_out``.
        pack: packed copy that is read instead of the files; its ``reading`` is that of the copy.
        location: finds the encoded images by their paths; None for files in ``root``, which otherwise is a
            name for messages.
        own_steps: training augmentation that replaces the one of ``preparation``.

    Raises:
        UsageError: if ``corrupt`` is unknown or ``workers`` is negative.
    """

    root: Path
    images: ImageList
    preparation: Preparation
    workers: int = 0
    corrupt: str = "stop"
    reading: Reading = Reading()  # noqa: RUF009 (immutable)
    plain: Preprocessing | None = None
    left_out: tuple[str, ...] = ()
    unreadable: dict[str, int] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    pack: Pack | None = None
    location: Location | None = None
    own_steps: Steps | None = None

    def __post_init__(self) -> None:
        if self.corrupt not in CORRUPT_POLICIES:
            raise unknown("corrupt", self.corrupt, CORRUPT_POLICIES)
        if self.workers < 0:
            raise UsageError(f"workers must be at least 0, got {self.workers}")

    @property
    def targets(self) -> NDArray[np.int64]:
        """Classes, int64 ``[N]``."""
        return self.images.targets

    @property
    def channels(self) -> int:
        """Number of channels of the network's input, 1 or 3."""
        return self.preprocessing.channels

    @property
    def mean(self) -> tuple[float, ...]:
        """See :meth:`fastsam.longtail.data.Images.mean`."""
        return self.preparation.mean

    @property
    def std(self) -> tuple[float, ...]:
        """See :meth:`fastsam.longtail.data.Images.std`."""
        return self.preparation.std

    @property
    def frame(self) -> Frame:
        """See :meth:`fastsam.longtail.data.Images.frame`."""
        return Frame((self.preparation.size, self.preparation.size), len(self))

    @property
    def preprocessing(self) -> Preprocessing:
        """See :meth:`fastsam.longtail.data.Images.preprocessing`."""
        return self.plain or self.preparation.evaluation(self.reading)

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        draw: Draw | None,
        device: torch.device,
        *,
        may_be_empty: bool = False,
    ) -> Iterator[Batch]:
        """See :meth:`fastsam.longtail.data.Images.batches`.

        Raises:
            DataError: if an image cannot be read and ``corrupt`` is ``stop``, or no image of a batch can be
                read and it must not be empty. It cannot be skipped: other ranks wait for their parts of it.
        """
        seeds = [None] * len(order) if draw is None else draw.seeds(order)
        requests = (Request(batch, keys) for batch, keys in zip(order, seeds, strict=True))
        finish = DevicePart(
            Normalization(self.preprocessing.mean, self.preprocessing.std),
            self._steps.per_batch,
        ).on(device)
        for read in self._workers.read(requests, pin=device.type == "cuda"):
            for image in read.unreadable:
                self._note(image)
            batch = finish(read)
            if batch is None and may_be_empty:
                batch = self._nothing(device)
            if batch is None:
                path, reason = read.unreadable[0]
                raise DataError(
                    f"no image of a batch can be read, starting with {self.root / path} ({reason}), although "
                    f"they could when the run began; make {self.root} available and resume the run"
                )
            yield batch

    def _nothing(self, device: torch.device) -> Batch:
        """Return a batch without images."""
        inputs = torch.empty(0, self.channels, *self.preprocessing.size, device=device)
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Batch((inputs,), none, none)

    def name_of(self, place: int) -> str:
        """See :meth:`fastsam.longtail.data.Images.name_of`."""
        return self.images.paths[place]

    def scan(self, *, progress: bool = False) -> Scan:
        """See :meth:`fastsam.longtail.data.Images.scan`. A packed copy is not decoded again."""
        if self.pack is not None:
            broken = [i for i, path in enumerate(self.images.paths) if self.pack.broken(path)]
            return Scan(dict.fromkeys(broken, "the file could not be read when it was packed"))
        return scan_files(self.encoded(), self.reading, workers=self.workers, progress=progress)

    def digests(
        self, places: Sequence[int] | None = None, *, whole: bool = False, progress: bool = False
    ) -> list[bytes]:
        """See :meth:`fastsam.longtail.data.Images.digests`.

        Digests of a packed copy are those of the original files; with ``whole``, the files are read.
        """
        if self.pack is not None and not whole:
            chosen = range(len(self)) if places is None else places
            rows = (self.pack.rows[self.images.paths[place]] for place in chosen)
            return [self.pack.digests[row] for row in rows]
        return file_digests(self.encoded(places), whole=whole, progress=progress)

    def content(self, *, progress: bool = False) -> str:
        """See :meth:`fastsam.longtail.data.Images.content`."""
        if "content" not in self.known:
            self.known["content"] = content_hash(self.digests(progress=progress), self.targets)
        return self.known["content"]

    def readable(self, *, progress: bool = False) -> FileImages:
        """Return a copy without the images that cannot be decoded, which are listed in ``left_out``.

        The result of the decode scan is cached; see :func:`fastsam.longtail.data.scan.cached_scan`.

        Args:
            progress: show progress: a bar on a terminal, one line per minute elsewhere.
        """
        content = self.content(progress=progress)
        broken = cached_scan(content, self.reading, lambda: self.scan(progress=progress)).unreadable
        kept = np.setdiff1d(np.arange(len(self)), list(broken))
        paths = self.images.paths
        images = ImageList([paths[place] for place in kept.tolist()], self.targets[kept])
        return replace(self, images=images, left_out=tuple(paths[place] for place in broken))

    def prepared_as(self, preprocessing: Preprocessing) -> FileImages:
        """See :meth:`fastsam.longtail.data.Images.prepared_as`. Files support any preprocessing.

        A packed copy is read only with the reading that it was written with, and if its images are not
        enlarged; otherwise the files are read.
        """
        pack, needed = self.pack, preprocessing.resize or max(preprocessing.size)
        if pack is not None and (preprocessing.reading != self.reading or needed > pack.short_side):
            pack = None
        return replace(self, reading=preprocessing.reading, plain=preprocessing, pack=pack)

    def augmented(self, policy: Policy, *, workers: int = 0) -> FileImages:
        """See :meth:`fastsam.longtail.data.Images.augmented`. These images have their own workers."""
        return replace(self, own_steps=policy(self.preparation.steps(), self.frame))

    def normalized(self, mean: tuple[float, ...], std: tuple[float, ...]) -> FileImages:
        """See :meth:`fastsam.longtail.data.Images.normalized`."""
        plain = self.plain and replace(self.plain, mean=mean, std=std)
        return replace(self, preparation=replace(self.preparation, mean=mean, std=std), plain=plain)

    def encoded(self, places: Sequence[int] | None = None) -> Sequence[Encoded]:
        """Return the encoded images.

        Args:
            places: indices of the images; None for all.
        """
        paths = self.images.paths
        chosen = paths if places is None else [paths[place] for place in places]
        if self.location is not None:
            return Located(chosen, self.location)
        return [self.root / path for path in chosen]

    def for_run(self) -> FileImages:
        """See :meth:`fastsam.longtail.data.Images.for_run`."""
        return replace(self, unreadable={})

    def close(self) -> None:
        """See :meth:`fastsam.longtail.data.Images.close`."""
        self._workers.close()

    @cached_property
    def _workers(self) -> Workers:
        source: ImageSource = self.pack or FileSource(self.root, self.reading, self.location)
        reader = Reader(
            source if self.channels == 3 else GraySource(source),
            self.images,
            plain=self.preprocessing.resized,
            augmented=self._steps.crop,
            changed=self._steps.per_image,
        )
        return Workers(reader, self.workers)

    @property
    def _steps(self) -> Steps:
        return self.own_steps or self.preparation.steps()

    def _note(self, sample: Unreadable) -> None:
        if self.corrupt == "stop":
            again = "" if self.pack is None else ", write the packed copy again"
            raise DataError(
                f"cannot read {self.root / sample.path} ({sample.reason}); replace the file{again} or pass "
                "--corrupt skip"
            )
        self.unreadable[sample.path] = self.unreadable.get(sample.path, 0) + 1
