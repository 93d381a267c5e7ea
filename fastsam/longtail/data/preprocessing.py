"""Preprocessing of image files for a network, without augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from fastsam.extras import requires_extra
from fastsam.longtail.data.normalization import Normalization
from fastsam.longtail.data.pixels import EXIF, Exif, Reading, as_gray, decode
from fastsam.longtail.errors import UsageError
from fastsam.records import build

if TYPE_CHECKING:
    from PIL.Image import Image

Views = Literal[1, 5]
"""Number of crops of an image that a network sees: the center, or the center and the four corners."""

CHANNELS = (1, 3)
"""Supported numbers of channels of an input: grayscale or RGB."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the input of a network.

    The file is decoded as RGB, converted to grayscale if ``channels`` is 1, resized, scaled to [0, 1] and
    normalized. Resizing is bilinear with antialiasing.

    Attributes:
        size: height and width of the input, in pixels.
        channels: 1 for grayscale, 3 for RGB.
        mean: mean of each channel, subtracted from pixels in [0, 1]; a single value applies to all channels.
        std: standard deviation of each channel, by which pixels minus ``mean`` are divided.
        resize: length in pixels of the shorter side before ``size`` is cropped from the center; None to
            resize both sides to ``size``.
        exif: EXIF orientation: ``transpose`` applies it, ``ignore`` does not.
        value_range: values that are scaled to 0 and 1 in images with more than 8 bits per channel; None for
            0 and 65,535 in 16-bit images, and 0 and 1 in images of floats.
        views: number of crops: 1, or 5 for the four corners and the center. Inputs then have the shape
            ``[5, channels, H, W]``.

    Raises:
        ValueError: if a value is out of range, or the numbers of channels differ.

    Example:
        >>> gray = Preprocessing(size=(2, 2), channels=1, mean=(0.5,), std=(0.25,))
        >>> gray.prepare(torch.full((3, 2, 2), 0.75))
        tensor([[[1., 1.],
                 [1., 1.]]])
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    exif: Exif = "transpose"
    value_range: tuple[float, float] | None = None
    views: int = 1

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be a height and a width of at least 1, got {self.size}")
        if self.channels not in CHANNELS:
            raise ValueError(f"channels must be 1 (grayscale) or 3 (RGB), got {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{name} must have one value, or one for each of {self.channels} channels, got "
                    f"{len(values)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize must be at least 1, got {self.resize}")
        if self.exif not in EXIF:
            raise ValueError(f"exif must be one of {', '.join(EXIF)}, got {self.exif!r}")
        limits = self.value_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise ValueError(f"value_range must be two values in ascending order, got {limits}")
        if self.views not in get_args(Views):
            raise ValueError(f"views must be 1 or 5 (center and corners), got {self.views}")
        if self.views > 1 and self.resize is None:
            raise ValueError(
                f"{self.views} views are crops of a larger image, so they require resize"
            )

    @property
    def reading(self) -> Reading:
        """Options for decoding files."""
        return Reading(self.exif, self.value_range)

    def with_views(self, views: Views) -> Preprocessing:
        """Return a copy for evaluation with several views of each image.

        As in the code of LIFT (Shi et al., ICML 2024), the shorter side of the resized image is 248/224 of
        the size of the crops.

        Args:
            views: number of views; 1 returns this preprocessing.

        Raises:
            UsageError: if the number is not valid.

        Example:
            >>> center = Preprocessing((224, 224), 3, (0.5,), (0.5,), resize=256)
            >>> center.with_views(5).resize
            248
        """
        if views == 1:
            return self
        if views not in get_args(Views):
            raise UsageError(f"views must be 1 or 5 (center and corners), got {views}")
        return replace(self, resize=round(max(self.size) * 248 / 224), views=views)

    def check_size(self, height: int, width: int) -> None:
        """Raise :class:`UsageError` unless images in memory have the size of the network's input."""
        if self.views > 1:
            raise UsageError(
                f"{self.views} views are crops of image files, but these images are in memory with a fixed "
                "size; use 1 view"
            )
        if (height, width) != tuple(self.size):
            raise UsageError(
                f"the network requires images of {self.size[0]}x{self.size[1]} pixels, got {height}x{width}; "
                "resize them, or pass image files, which are resized automatically"
            )

    def apply(self, path: str | Path) -> Tensor:
        """Read and preprocess an image file.

        Args:
            path: path of the file.

        Returns:
            The input of the network, float32 ``[channels, H, W]``.

        Raises:
            OSError: if the file is missing, damaged or in an unsupported format.
            ValueError: if pixel values are outside the range, or the range is unknown and not given.
        """
        return self.prepare(decode(Path(path), self.reading).pixels)

    def prepare(self, image: Image | Tensor) -> Tensor:
        """Preprocess a decoded image.

        Args:
            image: an RGB Pillow image, or float32 ``[3, H, W]`` in [0, 1] with equal channels.

        Returns:
            The input of the network, float32 ``[channels, H, W]``.
        """
        return normalized(self.resized(image), self.mean, self.std)

    def resized(self, image: Image | Tensor) -> Tensor:
        """Convert to grayscale if required, resize and crop a decoded image, without normalizing it.

        Args:
            image: an RGB Pillow image, or float32 ``[3, H, W]`` in [0, 1] with equal channels.

        Returns:
            The pixels ``[channels, H, W]``, or ``[views, channels, H, W]``, uint8 unless the image is a
            tensor.
        """
        with requires_extra("longtail", "an image file"):
            from torchvision.transforms.v2 import functional

        if self.channels == 1:
            image = as_gray(image)
        if self.resize is None:
            image = functional.resize(image, list(self.size))
        else:
            image = functional.resize(image, [self.resize])
            if self.views > 1:
                crops = functional.five_crop(image, list(self.size))
                return torch.stack([_as_tensor(crop) for crop in crops])
            image = functional.center_crop(image, list(self.size))
        return _as_tensor(image)

    def as_dict(self) -> dict[str, Any]:
        """Convert to a dict of JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Create an instance from the result of :meth:`as_dict`.

        Raises:
            ValueError: if a field is unknown or missing, or has an invalid value.
        """
        return build(cls, values)


def _as_tensor(image: Image | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image
    with requires_extra("longtail", "an image file"):
        from torchvision.transforms.v2 import functional

    pixels: Tensor = functional.pil_to_tensor(image)
    return pixels


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale an image to [0, 1] and normalize it.

    Args:
        pixels: uint8 ``[C, H, W]``, or float32 in [0, 1].
        mean: mean of each channel.
        std: standard deviation of each channel.

    Returns:
        Float32 ``[C, H, W]``.
    """
    return Normalization(tuple(mean), tuple(std)).on(torch.device("cpu"))(pixels)
