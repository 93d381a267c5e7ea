"""The form every data set has once it is loaded, whatever its files look like."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsam.longtail.data.augment import BatchAugmentation
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.content import content_hash
from fastsam.longtail.data.preprocessing import CHANNELS, Preprocessing
from fastsam.longtail.data.scan import Scan
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.seeds import Stream, torch_generator
from fastsam.upload import upload


class Images(Protocol):
    """A labelled set of images that can be read in any order."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """Classes, int64 ``[N]``."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the images."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, subtracted from pixels in [0, 1]."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, by which they are then divided."""
        ...

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How an image file becomes an input like those of the set; None where that is unknown."""
        ...

    @property
    def unreadable(self) -> Mapping[str, int]:
        """How often each image that cannot be read was met and skipped."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """Names of the images that a decode scan removed from the set."""
        ...

    def __len__(self) -> int: ...

    def batches(
        self, order: Sequence[NDArray[np.int64]], draw: Draw | None, device: torch.device
    ) -> Iterator[Batch]:
        """The batches whose sample indices ``order`` lists.

        Args:
            order: for each batch the indices of its samples, int64.
            draw: which sample of the training augmentation to read; None for the plain images.
            device: where the batch is wanted.
        """
        ...

    def name_of(self, place: int) -> str:
        """What to call the image at ``place`` in a message."""
        ...

    def scan(self, *, progress: bool = False) -> Scan:
        """Decode every image; see :func:`fastsam.longtail.data.scan.scan_files`.

        Args:
            progress: show progress: a bar on a terminal, a line a minute elsewhere.
        """
        ...

    def digests(
        self, places: Sequence[int] | None = None, *, whole: bool = False, progress: bool = False
    ) -> list[bytes]:
        """Return a digest of the content of each image.

        Args:
            places: which images; None for all.
            whole: digest every byte of a file, not only its size and a sample.
            progress: show progress: a bar on a terminal, a line a minute elsewhere.
        """
        ...

    def content(self, *, progress: bool = False) -> str:
        """Return the SHA-256 of contents and classes, images of ``left_out`` included."""
        ...

    def prepared_as(self, preprocessing: Preprocessing) -> Images:
        """Return the same images, read without augmentation as a trained network needs them.

        Args:
            preprocessing: how image files became inputs of the network.

        Raises:
            UsageError: the images are in memory and have another size.
        """
        ...

    def for_run(self) -> Images:
        """The same images with ``unreadable`` and workers of their own: runs may share a set."""
        ...

    def close(self) -> None:
        """End what reading left running; the images can still be read."""
        ...


_Decoded = TypeVar("_Decoded", bound="DecodedImages")


class DecodedImages:
    """What is the same for all images that need no file to be decoded here."""

    @property
    def unreadable(self) -> Mapping[str, int]:
        """See :meth:`Images.unreadable`; all can be read."""
        return {}

    @property
    def left_out(self) -> Sequence[str]:
        """See :meth:`Images.left_out`; all can be read."""
        return ()

    @property
    def preprocessing(self) -> Preprocessing | None:
        """See :meth:`Images.preprocessing`; what made the images is not known."""
        return None

    def name_of(self, place: int) -> str:
        """See :meth:`Images.name_of`."""
        return f"image {place}"

    def scan(self, *, progress: bool = False) -> Scan:
        """See :meth:`Images.scan`; there is nothing to decode."""
        return Scan()

    def for_run(self: _Decoded) -> _Decoded:
        """See :meth:`Images.for_run`; reading leaves nothing behind that runs could not share."""
        return self

    def close(self) -> None:
        """See :meth:`Images.close`; there is nothing to end."""


@dataclass(eq=False)
class TensorImages(DecodedImages):
    """Images that fit in memory, augmented in whole batches on the device.

    The device that read last keeps a copy of the images; the CPU waits for it at the first reading
    alone.

    Attributes:
        images: raw pixels, uint8 ``[N, C, H, W]``; replaced as a whole or not changed at all.
        targets: classes, int64 ``[N]``.
        white: pixel value that becomes 1 before normalisation (255, or 16 for the 8x8 digits).
        mean: mean of each channel after that scaling.
        std: standard deviation of each channel after that scaling.
        augmentation: what a :class:`Draw` samples; None for sets that are only evaluated.
    """

    images: Tensor
    targets: NDArray[np.int64]
    white: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: BatchAugmentation | None = None
    _copy: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    """Images that were read on another device than their own, and what is there."""

    @property
    def channels(self) -> int:
        """See :meth:`Images.channels`."""
        return self.images.shape[1]

    @property
    def preprocessing(self) -> Preprocessing | None:
        """See :meth:`Images.preprocessing`; files of any size are resized to that of the images.

        White of a file is 1, as ``white`` is here.
        """
        _, channels, height, width = self.images.shape
        if channels not in CHANNELS:
            return None
        return Preprocessing((height, width), channels, tuple(self.mean), tuple(self.std))

    def __len__(self) -> int:
        return len(self.targets)

    def select(
        self, indices: NDArray[np.int64], *, augmentation: BatchAugmentation | None = None
    ) -> TensorImages:
        """The subset at ``indices`` (int64), with its own augmentation."""
        images = self.images[torch.from_numpy(indices)]
        return TensorImages(
            images, self.targets[indices], self.white, self.mean, self.std, augmentation
        )

    def batches(
        self, order: Sequence[NDArray[np.int64]], draw: Draw | None, device: torch.device
    ) -> Iterator[Batch]:
        """See :meth:`Images.batches`."""
        if draw is not None and self.augmentation is None:
            raise UsageError("these images have no augmentation; read them with draw=None")
        images = self._on(device)
        mean = upload(torch.tensor(self.mean), device)[:, None, None]
        std = upload(torch.tensor(self.std), device)[:, None, None]
        # One upload for all batches.
        sizes = [len(chosen) for chosen in order]
        samples = np.concatenate([np.empty(0, np.int64), *order])
        every = torch.split(upload(torch.from_numpy(samples), device), sizes)
        targets = torch.split(upload(torch.from_numpy(self.targets[samples]), device), sizes)
        for number, indices in enumerate(every):
            raw = images[indices]
            if draw is not None and self.augmentation is not None:
                raw = self.augmentation(
                    raw, torch_generator(draw.seed, Stream.AUGMENT, draw.epoch, number)
                )
            inputs = (raw.float() / self.white - mean) / std
            yield Batch((inputs,), targets[number], indices)

    def prepared_as(self, preprocessing: Preprocessing) -> TensorImages:
        """See :meth:`Images.prepared_as`."""
        preprocessing.check_size(self.images.shape[-2], self.images.shape[-1])
        return replace(self, mean=preprocessing.mean, std=preprocessing.std)

    def digests(
        self, places: Sequence[int] | None = None, *, whole: bool = False, progress: bool = False
    ) -> list[bytes]:
        """See :meth:`Images.digests`; of all pixels, whatever ``whole`` is."""
        pixels = self.images.cpu().contiguous().numpy()
        chosen = range(len(pixels)) if places is None else places
        return [hashlib.sha256(pixels[place].data).digest() for place in chosen]

    def content(self, *, progress: bool = False) -> str:
        """See :meth:`Images.content`."""
        return content_hash(self.digests(), self.targets)

    def _on(self, device: torch.device) -> Tensor:
        """The images on ``device``."""
        device = torch.empty(0, device=device).device  # with its number, which "cuda" leaves open
        if self.images.device == device:
            return self.images
        if self._copy is None or self._copy[0] is not self.images or self._copy[1].device != device:
            self._copy = (self.images, self.images.to(device))
        return self._copy[1]


@dataclass(eq=False)
class LongTailData:
    """A training set with a long tail and the sets that judge what was learnt from it.

    Attributes:
        name: name on the command line.
        train: the long-tailed training images.
        validation: images for choosing hyper-parameters; None where the data set has none.
        test: images for the reported result, the same whatever the imbalance.
        class_names: one name per class.
        groups: the classes called head, mid and tail by the paper.
        subset_hash: SHA-256 of which images, in which order and of which class, form the training
            set: of the selection where it is made here (:func:`~.subset.subset_hash`), else of the
            list and the names of the classes (:func:`~.lists.list_hash`). Equal for the same data
            set under another root.
    """

    name: str
    train: Images
    validation: Images | None
    test: Images
    class_names: tuple[str, ...]
    groups: Mapping[str, tuple[int, ...]]
    subset_hash: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise DataError(
                f"{self.name} has {self.num_classes} class; a classifier needs at least 2"
            )
        for part, images in self.splits.items():
            labels = images.targets
            if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
                wrong = labels.min() if labels.min() < 0 else labels.max()
                raise DataError(
                    f"the {part} set of {self.name} has label {wrong}, but class_names has "
                    f"{self.num_classes} names (labels 0 to {self.num_classes - 1})"
                )
        grouped = [label for members in self.groups.values() for label in members]
        if grouped and not (min(grouped) >= 0 and max(grouped) < self.num_classes):
            raise DataError(
                f"groups of {self.name} name class {max(grouped)}, but there are "
                f"{self.num_classes} classes"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Training images of each class, int64 ``[num_classes]``."""
        return np.bincount(self.train.targets, minlength=self.num_classes).astype(np.int64)

    def group_lists(self) -> dict[str, list[int]]:
        """Return ``groups`` as plain values for files."""
        return {name: list(members) for name, members in self.groups.items()}

    @property
    def splits(self) -> dict[str, Images]:
        """The sets there are, by the names ``train``, ``validation`` and ``test``."""
        named = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {name: images for name, images in named.items() if images is not None}

    def split(self, name: str) -> Images:
        """The images of one of :attr:`splits`.

        Raises:
            UsageError: if there is no such set.
        """
        splits = self.splits
        if name not in splits:
            raise UsageError(f"{self.name} has no split {name!r}; valid: {', '.join(splits)}")
        return splits[name]

    def contents(
        self, *, splits: Collection[str] | None = None, progress: bool = False
    ) -> dict[str, str]:
        """Return the SHA-256 of contents and classes of every split; see :meth:`Images.content`.

        Neither the place of the files nor their names enter it; the order of images and the names
        of classes do.

        Args:
            splits: which splits, beside the names of the classes; None for all.
            progress: show progress: a bar on a terminal, a line a minute elsewhere.
        """
        names = hashlib.sha256("\0".join(self.class_names).encode()).hexdigest()
        hashes = {
            part: images.content(progress=progress)
            for part, images in self.splits.items()
            if splits is None or part in splits
        }
        return {"classes": names, **hashes}

    def for_run(self) -> LongTailData:
        """The same data set for one run; see :meth:`Images.for_run`."""
        own: dict[str, Any] = {name: images.for_run() for name, images in self.splits.items()}
        return replace(self, **own)

    def close(self) -> None:
        """End what reading left running; see :meth:`Images.close`."""
        for images in self.splits.values():
            images.close()
