"""Registry of augmentation policies, and the steps that a policy consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fastsam.longtail.data.augment import BatchAugmentation, ImageAugmentation
from fastsam.longtail.data.worker_count import WorkerSettings
from fastsam.longtail.errors import UsageError
from fastsam.longtail.registry import Registry, RunPart
from fastsam.longtail.seeds import SampleSeeds, global_seed

_TRANSFORM = 64
"""Number of the random stream of transforms. Steps of whole batches use the small numbers."""


@dataclass(frozen=True)
class Steps:
    """The steps of an augmentation in order. The workers make the first two, the device the third.

    Attributes:
        crop: maps a decoded image of any size to pixels ``[C, H, W]`` of the network's size; None to prepare
            images as in evaluation.
        per_image: changes pixels ``[C, H, W]`` of the network's size; None for no change.
        per_batch: changes whole batches; None for no change.
    """

    crop: ImageAugmentation | None = None
    per_image: ImageAugmentation | None = None
    per_batch: BatchAugmentation | None = None


@dataclass(frozen=True)
class Frame:
    """What a policy may depend on besides its settings.

    Attributes:
        size: height and width of the network's input in pixels.
        count: number of training images.
    """

    size: tuple[int, int]
    count: int


Policy = Callable[[Steps, Frame], Steps]
"""Maps the steps of the data set's own augmentation to those of a run."""


@dataclass(frozen=True, kw_only=True)
class AugmentationPart(RunPart):
    """An augmentation policy. Once it is registered, ``--augment NAME`` trains with it.

    Attributes:
        build: ``build(settings, default, frame)`` returns the :class:`Steps`. ``default`` are the steps of
            the data set's own augmentation.
        draws: whether training augments images; False reads them as in evaluation.
        chosen: ``chosen(frame)`` describes what the policy chose, for the user; None if it has no choice.
    """

    build: Callable[[Any, Steps, Frame], Steps]
    draws: bool = True
    chosen: Callable[[Frame], str] | None = None


AUGMENTATIONS: Registry[AugmentationPart] = Registry(
    "augmentation", "fastsam.longtail.data.augmentations"
)

register_augmentation = AUGMENTATIONS.add


@dataclass(frozen=True)
class Drawn:
    """A transform that samples from torch's global CPU generator, which is seeded for each image.

    The result depends only on the image and its seed, not on the process that computes it.

    Args:
        transform: maps an image to an augmented one.
        stream: number of the random stream; None for the seeds of the image themselves.
    """

    transform: Callable[[Any], Tensor]
    stream: int | None = _TRANSFORM

    def __call__(self, image: Any, seeds: SampleSeeds) -> Tensor:
        """Change an image.

        Args:
            image: the image.
            seeds: seed of the image.
        """
        own = seeds if self.stream is None else seeds.spawn(self.stream)
        with global_seed(int(own.bits(1)[0, 0] >> np.uint64(1))):
            return self.transform(image)


@dataclass(frozen=True)
class _Checked:
    """A transform of the user that must keep shape and dtype."""

    name: str
    transform: Callable[[Tensor], Tensor]

    def __call__(self, pixels: Tensor) -> Tensor:
        changed = self.transform(pixels)
        if not (
            isinstance(changed, Tensor)
            and changed.shape == pixels.shape
            and changed.dtype == pixels.dtype
        ):
            found = (
                f"{changed.dtype} {list(changed.shape)}"
                if isinstance(changed, Tensor)
                else type(changed).__name__
            )
            raise UsageError(
                f"augmentation {self.name!r} must return a tensor like its input, {pixels.dtype} "
                f"{list(pixels.shape)}, got {found}; keep size and type of the images"
            )
        return changed


def register_transform(
    name: str, transform: Callable[[Tensor], Tensor], *, after_default: bool = False
) -> AugmentationPart:
    """Register a function on tensors as an augmentation, such as a transform of torchvision.

    The workers call it with pixels ``[C, H, W]`` of the network's size: uint8, or float32 in [0, 1] for
    images with more than 8 bits per channel. It must sample from torch's global generator only, which is
    seeded for each image.

    Args:
        name: name of the augmentation for ``augment=NAME``.
        transform: maps the pixels to augmented pixels of the same shape and dtype.
        after_default: apply it in addition to the data set's own augmentation instead of replacing it.

    Example:
        >>> from fastsam.longtail import recipe
        >>> part = register_transform("upside-down", lambda pixels: pixels.flip(-2))
        >>> recipe("digits-lt", "ce", "sgd", augment="upside-down").config().augment
        'upside-down'
    """
    checked = _Checked(name, transform)

    def build(settings: Any, default: Steps, frame: Frame) -> Steps:
        return with_transform(default if after_default else Steps(), checked)

    build.__module__ = getattr(transform, "__module__", None) or build.__module__
    return register_augmentation(
        AugmentationPart(
            name=name,
            summary="a function passed from Python",
            build=build,
            settings=WorkerSettings,
        )
    )


def with_transform(default: Steps, transform: Callable[[Tensor], Tensor]) -> Steps:
    """Return steps that apply a random transform to each image, after the steps of ``default`` on it.

    Args:
        default: steps of the data set's own augmentation.
        transform: a transform that samples from torch's global generator.
    """
    return Steps(default.crop, _then(default.per_image, Drawn(transform)), default.per_batch)


@dataclass(frozen=True)
class _Sequence:
    """Two changes of an image, one after the other."""

    first: ImageAugmentation
    second: ImageAugmentation

    def __call__(self, image: Any, seeds: SampleSeeds) -> Tensor:
        return self.second(self.first(image, seeds), seeds)


def _then(first: ImageAugmentation | None, second: ImageAugmentation) -> ImageAugmentation:
    return second if first is None else _Sequence(first, second)
