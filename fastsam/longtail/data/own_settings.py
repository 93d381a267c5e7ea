"""Settings of the user's own images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastsam.longtail.data.catalog import ImageFileSettings, ImageSettings
from fastsam.longtail.data.files import IMAGENET_MEAN, IMAGENET_STD
from fastsam.longtail.data.pixels import Exif, Reading
from fastsam.longtail.errors import UsageError
from fastsam.longtail.settings import Settings, setting

Channels = Literal[0, 1, 3]
NormalizationName = Literal["imagenet", "set", "half", "network"]


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Settings):
    """Settings of the parts that fastsam holds out, and of the cut to a long tail."""

    split_test: float = setting(
        "fraction of the images of each class to hold out for the test, if the data have no test part",
        default=0.0,
        before=0.0,
        low=0,
        high=0.9,
    )
    split_validation: float = setting(
        "fraction of the images of each class to hold out for validation, if the data have no validation "
        "part",
        default=0.0,
        before=0.0,
        low=0,
        high=0.9,
    )
    split_seed: int = setting(
        "seed of the choice of the images that split_test, split_validation and cut_imbalance hold out",
        default=0,
        before=0,
        low=0,
        high=2**32 - 1,
    )
    cut_imbalance: float | None = setting(
        "cut the training images to a long tail with this imbalance factor: size of the largest class "
        "divided by the size of the smallest",
        optional=True,
        default_text="all training images",
        low=1,
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check that images are left for training, and that the seed is used."""
        super().check(run)
        if self.split_test + self.split_validation >= 1:
            raise UsageError(
                f"split_test and split_validation must sum to less than 1, got {self.split_test:g} and "
                f"{self.split_validation:g}, which leaves no training images"
            )
        chooses = self.split_test or self.split_validation or self.cut_imbalance is not None
        if self.split_seed and not chooses:
            raise UsageError(
                f"split_seed {self.split_seed} would have no effect, because no images are held out; add "
                "split_test, split_validation or cut_imbalance, or omit it"
            )


@dataclass(frozen=True, kw_only=True)
class InputSettings(Settings):
    """Settings of how a decoded image becomes an input of the network."""

    exif: Exif = setting(
        "EXIF orientation of your own images: transpose (apply it) or ignore; the orientation of images of "
        "published data sets is always ignored",
        default="transpose",
        before="ignore",
    )
    value_range: tuple[float, float] | None = setting(
        "pixel values of black and white in images with more than 8 bits per channel",
        optional=True,
        default_text="0 65535 for 16-bit images, 0 1 for floats",
    )
    channels: Channels = setting(
        "channels of the network's input: 3 (RGB), 1 (grayscale), or 0 to choose 1 if all training images "
        "are grayscale, else 3",
        default=3,
        before=3,
    )
    normalization: NormalizationName = setting(
        "mean and standard deviation of the pixels: imagenet (those of ImageNet), set (those of the training "
        "images), half (0.5 and 0.5) or network (those of the pretrained network)",
        default="imagenet",
        before="imagenet",
    )
    pixel_mean: tuple[float, ...] | None = setting(
        "mean of each channel of pixels in [0, 1], instead of --normalization; requires --pixel-std",
        optional=True,
        default_text="from --normalization",
    )
    pixel_std: tuple[float, ...] | None = setting(
        "standard deviation of each channel of pixels in [0, 1]; requires --pixel-mean",
        optional=True,
        default_text="from --normalization",
        above=0,
    )

    def check(self, run: Mapping[str, Any]) -> None:
        """Check the range of values, and that mean and standard deviation fit each other and the channels."""
        super().check(run)
        limits = self.value_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise UsageError(
                f"value_range must be two values in ascending order, such as 0 4095, got {limits}"
            )
        mean, std = self.pixel_mean, self.pixel_std
        if (mean is None) != (std is None):
            raise UsageError(
                f"pixel_mean and pixel_std require each other, got {mean} and {std}; pass both or neither"
            )
        if mean is not None and std is not None:
            valid = (1, 3) if self.channels == 0 else (1, self.channels)
            if len(mean) != len(std) or len(mean) not in valid:
                raise UsageError(
                    f"pixel_mean and pixel_std must have one value, or one for each of {self.channels or 3} "
                    f"channels, got {mean} and {std}"
                )
            if self.normalization != "imagenet":
                raise UsageError(
                    f"pixel_mean and pixel_std replace normalization {self.normalization!r}; pass either"
                )
        if self.normalization == "network" and run.get("pretrained") is None:
            raise UsageError(
                "normalization 'network' requires a pretrained network, but the weights of this one are "
                "random; choose imagenet, set or half"
            )

    @property
    def reading(self) -> Reading:
        """How files become pixel values."""
        return Reading(self.exif, self.value_range)

    def statistics(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel.

        ``set`` and ``network`` have those of ImageNet until the caller replaces them.

        Args:
            channels: number of channels, 1 or 3. A single channel gets the average over those of ImageNet.
        """
        mean, std = self.pixel_mean, self.pixel_std
        if mean is None or std is None:
            mean, std = IMAGENET_MEAN, IMAGENET_STD
            if self.normalization == "half":
                mean, std = (0.5,), (0.5,)
            elif channels == 1:
                mean, std = (round(sum(mean) / 3, 4),), (round(sum(std) / 3, 4),)
        if len(mean) not in (1, channels):
            raise UsageError(
                f"pixel_mean and pixel_std must have one value for {channels} channel(s), got {mean} and "
                f"{std}"
            )
        return mean * (channels // len(mean)), std * (channels // len(std))


@dataclass(frozen=True, kw_only=True)
class OwnSettings(SplitSettings, InputSettings, ImageSettings):
    """Settings of the user's own images, wherever they are."""


@dataclass(frozen=True, kw_only=True)
class OwnFileSettings(OwnSettings, ImageFileSettings):
    """Settings of the user's own image files."""


@dataclass(frozen=True, kw_only=True)
class TableSettings(Settings):
    """Settings of tables with one row for each image."""

    label_column: str | None = setting(
        "column of the classes",
        optional=True,
        default_text="label, or the only column of class labels of a Hugging Face data set",
    )
    group_column: str | None = setting(
        "column of groups of images, such as patient or camera, that split_test and split_validation keep "
        "together",
        optional=True,
        default_text="no groups",
    )
