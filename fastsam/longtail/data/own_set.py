"""From the user's labeled images to a data set: split, cut, channels and normalization."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsam.longtail.data.channels import found_channels
from fastsam.longtail.data.dataset import LongTailData
from fastsam.longtail.data.duplicates import repeated_paths
from fastsam.longtail.data.encoded import Location
from fastsam.longtail.data.files import Preparation
from fastsam.longtail.data.groups import check_several
from fastsam.longtail.data.listed import assemble
from fastsam.longtail.data.lists import ImageList, class_counts
from fastsam.longtail.data.own_settings import OwnSettings
from fastsam.longtail.data.splits import check_groups, cut_to_imbalance, hold_out
from fastsam.longtail.data.statistics import pixel_statistics
from fastsam.longtail.errors import DataError, UsageError

_MOST_DIGITS = 640
"""Largest number of digits that Python converts to an integer in every configuration."""


@dataclass(frozen=True, eq=False)
class OwnImages:
    """The user's labeled images, in the parts that they come in.

    Attributes:
        name: name of the data set.
        root: folder that the paths are relative to, or a name for messages.
        lists: paths and classes of the parts ``train``, ``validation`` and ``test``; at least ``train``.
        missing_test: what the user can add to have a test part, for the message.
        leave_out: how the user can leave out a given ``{part}``, for the message; empty if there is no way.
        class_names: names of the classes; None for their labels.
        groups: group of each image, by part; None for no groups.
        group_column: name of the column of the groups.
        location: finds the encoded images by their paths; None for files in ``root``.
        packed: whether to read the packed copy in ``root``.
        notes: lines about the data for the user.
    """

    name: str
    root: Path
    lists: Mapping[str, ImageList]
    missing_test: str
    leave_out: str = ""
    class_names: tuple[str, ...] | None = None
    groups: Mapping[str, NDArray[np.object_]] | None = None
    group_column: str = ""
    location: Location | None = None
    packed: bool = False
    notes: tuple[str, ...] = ()

    def load(self, settings: OwnSettings, *, progress: bool = False) -> LongTailData:
        """Create the data set.

        Args:
            settings: settings of the data set.
            progress: show progress: a bar on a terminal, one line per minute elsewhere.

        Raises:
            UsageError: if settings contradict the parts that there are.
            DataError: if a path is listed more than once, a group spans parts, a class has no training
                image, or there is no test part.
        """
        faults = repeated_paths(self.lists)
        if faults:
            raise DataError(
                f"{'; '.join(faults)}. Repeated images make counts wrong or leak training images into the "
                "test set; list every image once"
            )
        if self.groups is not None:
            check_groups(self.groups, self.group_column)
        names, lists = self._with_classes()
        check_several(class_counts(lists["train"], None, "the training list"), self.name)
        lists, notes = self._split(lists, settings)
        train = lists["train"]
        if settings.cut_imbalance is not None:
            kept = cut_to_imbalance(train.targets, settings.cut_imbalance, settings.split_seed)
            notes += (
                f"cut to imbalance {settings.cut_imbalance:g}: {len(kept)} of {len(train)} images",
            )
            lists["train"] = train = train.select(kept)
        data = assemble(
            self.name,
            lists,
            self.root,
            num_classes=None,
            boundaries=None,
            preparation=Preparation(settings.image_size),
            reading=settings.reading,
            workers=settings.workers,
            corrupt=settings.corrupt,
            packed=self.packed,
            progress=progress,
            class_names=names,
            notes=(*self.notes, *notes),
            location=self.location,
        )
        return self._prepared(data, settings, progress=progress)

    def _prepared(
        self, data: LongTailData, settings: OwnSettings, *, progress: bool
    ) -> LongTailData:
        """Choose channels and normalization, and describe them."""
        images: Any = data.train
        channels = settings.channels or found_channels(images, progress=progress)
        mean, std = settings.statistics(channels)
        preparation = Preparation(settings.image_size, mean, std, channels=channels)
        parts: dict[str, Any] = data.splits
        made = replace(
            data, **{part: replace(found, preparation=preparation) for part, found in parts.items()}
        )
        if settings.normalization == "network":
            return made  # the caller sets and describes that of the network
        if settings.normalization == "set":
            images = made.train
            made = made.normalized(*pixel_statistics(images, progress=progress))
        return made.described()

    def _with_classes(self) -> tuple[tuple[str, ...] | None, dict[str, ImageList]]:
        """Leave out class names without any image, and check that the others have a training image."""
        if self.class_names is None:
            return None, dict(self.lists)
        every = np.unique(np.concatenate([images.targets for images in self.lists.values()]))
        absent = np.setdiff1d(every, self.lists["train"].targets)
        if len(absent):
            raise DataError(
                f"class {self.class_names[absent[0]]!r} has no training image, but images in other parts; "
                "add training images of it or remove its images"
            )
        lists = {
            part: ImageList(images.paths, np.searchsorted(every, images.targets))
            for part, images in self.lists.items()
        }
        return tuple(self.class_names[label] for label in every), lists

    def _split(
        self, lists: dict[str, ImageList], settings: OwnSettings
    ) -> tuple[dict[str, ImageList], tuple[str, ...]]:
        """Hold out the missing parts, and describe the split."""
        for part, share in (
            ("test", settings.split_test),
            ("validation", settings.split_validation),
        ):
            if share and part in lists:
                raise UsageError(
                    f"split_{part} {share:g} would hold out {part} images, but {self.name} has a {part} "
                    f"part already; omit --split-{part}{self.leave_out.format(part=part)}"
                )
        if "test" not in lists and settings.split_test == 0:
            raise DataError(
                f"{self.root} has no test part, which is required; {self.missing_test}, or hold out images "
                "of each class with --split-test 0.2"
            )
        if settings.split_test == settings.split_validation == 0:
            return lists, ()
        whole = lists["train"]
        groups = None
        if self.groups is not None:
            groups = np.unique(self.groups["train"].astype(str), return_inverse=True)[1]
        held = hold_out(
            whole.targets,
            test=settings.split_test,
            validation=settings.split_validation,
            seed=settings.split_seed,
            groups=groups,
        )
        made = dict(lists)
        for part, share in (
            ("test", settings.split_test),
            ("validation", settings.split_validation),
        ):
            if share == 0:
                continue
            chosen: NDArray[np.int64] = getattr(held, part)
            if not len(chosen):
                raise DataError(
                    f"no image can be held out for the {part} part, because every class needs one image or "
                    f"group for training; add images, or raise --split-{part} (now {share:g})"
                )
            made[part] = whole.select(chosen)
        made["train"] = whole.select(held.train)
        sizes = ", ".join(f"{len(images)} {part}" for part, images in made.items())
        kept = f", groups of {self.group_column!r} kept together" if groups is not None else ""
        note = f"split with seed {settings.split_seed}{kept}: {sizes} images"
        classes = int(whole.targets.max()) + 1
        for part in ("test", "validation"):
            lacking = classes - len(np.unique(made[part].targets)) if part in made else 0
            if lacking:
                note += f"; {lacking} of {classes} classes have no {part} image"
        return made, (note,)


def named_classes(
    labels: Sequence[object], where: Callable[[int], str] = "image {}".format
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names of the classes in order, numerically if all are integers, and each label.

    Args:
        labels: class of each image, text or integers.
        where: returns the place of the label with a given index, for the message.

    Returns:
        The names, and the label of each image, int64 ``[N]``.

    Raises:
        DataError: if all labels are integers and one has too many digits.

    Example:
        >>> named_classes(["10", "9", "10"])
        (('9', '10'), array([1, 0, 1]))
    """
    texts = [str(label) for label in labels]
    unique = set(texts)
    if all(text.removeprefix("-").isdecimal() for text in unique):
        longest = max(unique, key=len)
        if len(longest) > _MOST_DIGITS:
            raise DataError(
                f"{where(texts.index(longest))}: label {longest[:40]}... has {len(longest)} digits, expected "
                f"at most {_MOST_DIGITS}; shorten it"
            )
        names = sorted(unique, key=lambda text: (int(text), text))
    else:
        names = sorted(unique)
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), np.array([numbers[text] for text in texts], dtype=np.int64)
