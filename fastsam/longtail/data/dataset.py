"""The interface of loaded data sets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastsam.distributed import World
from fastsam.longtail.data.augmentations.base import Frame, Policy
from fastsam.longtail.data.batch import Batch, Draw
from fastsam.longtail.data.groups import check_several
from fastsam.longtail.data.normalization import check_normalization
from fastsam.longtail.data.preprocessing import Preprocessing
from fastsam.longtail.data.scan import Scan
from fastsam.longtail.errors import DataError, UsageError


class Images(Protocol):
    """Interface of labeled images that can be read in any order."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """Classes, int64 ``[N]``."""
        ...

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, which is subtracted from pixels in [0, 1]."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, by which pixels minus ``mean`` are divided."""
        ...

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How an image file becomes an input like these images; None if that is unknown."""
        ...

    @property
    def frame(self) -> Frame:
        """Size of the network's input, and number of images."""
        ...

    @property
    def unreadable(self) -> Mapping[str, int]:
        """How often each unreadable image was skipped, by name."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """Names of the unreadable images that a decode scan removed."""
        ...

    def __len__(self) -> int: ...

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        draw: Draw | None,
        device: torch.device,
        *,
        may_be_empty: bool = False,
    ) -> Iterator[Batch]:
        """Iterate over batches of images.

        Args:
            order: indices of the images of each batch, int64.
            draw: random choices of the training augmentation; None for clean images.
            device: device of the batches.
            may_be_empty: yield an empty batch if none of its images can be read, instead of stopping with an
                error. Images that can always be read ignore it.
        """
        ...

    def name_of(self, place: int) -> str:
        """Return the name of the image with index ``place`` for messages."""
        ...

    def scan(self, *, progress: bool = False) -> Scan:
        """Decode every image; see :func:`fastsam.longtail.data.scan.scan_files`.

        Args:
            progress: show progress: a bar on a terminal, one line per minute elsewhere.
        """
        ...

    def digests(
        self, places: Sequence[int] | None = None, *, whole: bool = False, progress: bool = False
    ) -> list[bytes]:
        """Return a digest of the content of each image.

        Args:
            places: indices of the images; None for all.
            whole: hash every byte of a file instead of its size and a sample.
            progress: show progress: a bar on a terminal, one line per minute elsewhere.
        """
        ...

    def content(self, *, progress: bool = False) -> str:
        """Return the SHA-256 of contents and classes, including the images in ``left_out``."""
        ...

    def prepared_as(self, preprocessing: Preprocessing) -> Images:
        """Return the same images without augmentation, preprocessed for a trained network.

        Args:
            preprocessing: preprocessing of the network.

        Raises:
            UsageError: if the images are in memory and have another size.
        """
        ...

    def augmented(self, policy: Policy, *, workers: int = 0) -> Images:
        """Return the same training images with another augmentation.

        Args:
            policy: maps the steps of the images' own augmentation to those that are made.
            workers: number of worker processes for steps on single images, if the images have no workers of
                their own.
        """
        ...

    def normalized(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
        """Return the same images with another normalization.

        Args:
            mean: mean of each channel of pixels in [0, 1].
            std: standard deviation of each channel.
        """
        ...

    def for_run(self) -> Images:
        """Return a copy with separate workers and ``unreadable``, so that runs can share a data set."""
        ...

    def close(self) -> None:
        """Stop background workers. The images can still be read afterwards."""
        ...


@dataclass(eq=False)
class LongTailData:
    """A long-tailed data set: training, validation and test images.

    Attributes:
        name: name on the command line.
        train: long-tailed training images.
        validation: images for choosing hyperparameters; None if the data set has none.
        test: images for reported results. They do not depend on the imbalance.
        class_names: one name per class.
        groups: classes of head, mid and tail.
        subset_hash: SHA-256 that identifies the training set. For data sets that fastsam cuts, it is the hash
            of the selected indices (:func:`~.subset.subset_hash`); for others, of the list of paths and
            labels and of the class names (:func:`~.lists.list_hash`). It does not depend on the folder.
        notes: lines about the data set for the user.
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
        check_several(self.class_names, self.name)
        for part, images in self.splits.items():
            labels = images.targets
            if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
                wrong = labels.min() if labels.min() < 0 else labels.max()
                raise DataError(
                    f"labels of the {part} set of {self.name} must be from 0 to {self.num_classes - 1}, the "
                    f"number of class_names minus 1, got {wrong}"
                )
        grouped = [label for members in self.groups.values() for label in members]
        if grouped and not (min(grouped) >= 0 and max(grouped) < self.num_classes):
            raise DataError(
                f"groups of {self.name} must contain labels from 0 to {self.num_classes - 1}, got "
                f"{min(grouped) if min(grouped) < 0 else max(grouped)}"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of training images of each class, int64 ``[C]``."""
        return np.bincount(self.train.targets, minlength=self.num_classes).astype(np.int64)

    def group_lists(self) -> dict[str, list[int]]:
        """Return ``groups`` as lists, for JSON."""
        return {name: list(members) for name, members in self.groups.items()}

    @property
    def splits(self) -> dict[str, Images]:
        """The existing splits by name: ``train``, ``validation`` and ``test``."""
        named = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {name: images for name, images in named.items() if images is not None}

    def split(self, name: str) -> Images:
        """Return the images of a split.

        Raises:
            UsageError: if there is no such split.
        """
        splits = self.splits
        if name not in splits:
            raise UsageError(f"{self.name} has no split {name!r}; valid: {', '.join(splits)}")
        return splits[name]

    def contents(
        self, *, splits: Collection[str] | None = None, progress: bool = False
    ) -> dict[str, str]:
        """Return the SHA-256 of images and labels of every split, and of the class names.

        It depends on the order of the images, but not on the location and names of files. See
        :meth:`Images.content`.

        Args:
            splits: splits to hash, in addition to the class names; None for all.
            progress: show progress: a bar on a terminal, one line per minute elsewhere.
        """
        names = hashlib.sha256("\0".join(self.class_names).encode()).hexdigest()
        hashes = {
            part: images.content(progress=progress)
            for part, images in self.splits.items()
            if splits is None or part in splits
        }
        return {"classes": names, **hashes}

    def augmented(self, policy: Policy, *, workers: int = 0) -> LongTailData:
        """Return a copy whose training images are augmented by ``policy``; see :meth:`Images.augmented`."""
        return replace(self, train=self.train.augmented(policy, workers=workers))

    def normalized(self, mean: Sequence[float], std: Sequence[float]) -> LongTailData:
        """Return a copy whose images are normalized for another network, such as a pretrained one.

        Args:
            mean: mean of each channel of pixels in [0, 1], which is subtracted.
            std: standard deviation of each channel, by which pixels minus ``mean`` are divided.

        Raises:
            UsageError: if the number of values does not fit the channels, or a value is not finite, or a
                deviation not positive.
        """
        check_normalization(self.name, self.train.channels, mean, std)
        new: dict[str, Any] = {
            name: images.normalized(tuple(mean), tuple(std)) for name, images in self.splits.items()
        }
        return replace(self, **new)

    def described(self) -> LongTailData:
        """Return a copy with a note about the input of the network: channels, size and normalization."""
        images = self.train
        height, width = images.frame.size
        shown = " and ".join(
            ", ".join(f"{value:g}" for value in values) for values in (images.mean, images.std)
        )
        note = (
            f"input: {images.channels} channel(s) of {height}x{width} pixels, mean and standard deviation "
            f"{shown}"
        )
        return replace(self, notes=(*self.notes, note))

    def for_run(self) -> LongTailData:
        """Return a copy for one run; see :meth:`Images.for_run`."""
        own: dict[str, Any] = {name: images.for_run() for name, images in self.splits.items()}
        return replace(self, **own)

    def unreadable(self, before: Mapping[str, int], world: World) -> dict[str, int]:
        """Return how often each unreadable image was skipped by any rank, in training and evaluation.

        Args:
            before: how often earlier processes of a resumed run skipped it.
            world: the ranks of the run; all must call this.
        """
        met = Counter(before)
        for images in self.splits.values():
            for skipped in world.all_gather(images.unreadable):
                met.update(skipped)
            # Images found unreadable by a scan count once, however often the run is resumed.
            met.update({name: 1 for name in images.left_out if name not in met})
        return dict(met)

    def close(self) -> None:
        """Stop background workers; see :meth:`Images.close`."""
        for images in self.splits.values():
            images.close()
