"""Images read from files on CPU workers, and what happens when one cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsam.longtail.data.dataset import Batch
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.upload import upload
from fastsam.longtail.errors import DataError, UsageError
from fastsam.longtail.seeds import Stream, derived_seed, global_seed

CORRUPT_POLICIES = ("stop", "skip")


@dataclass(frozen=True)
class Preparation:
    """How files become tensors.

    Attributes:
        size: height and width of the network's input.
        mean: mean of each channel.
        std: standard deviation of each channel.
        jitter: strength of brightness, contrast and saturation jitter in training.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    jitter: float = 0.4

    def training(self) -> Callable[[Any], Tensor]:
        """Random resized crop, flip, colour jitter."""
        from torchvision.transforms import v2

        return self._finished(
            v2.RandomResizedCrop(self.size),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(self.jitter, self.jitter, self.jitter, 0.0),
        )

    def evaluation(self) -> Callable[[Any], Tensor]:
        """Resize to 256/224 of the size, centre crop."""
        from torchvision.transforms import v2

        return self._finished(v2.Resize(round(self.size * 256 / 224)), v2.CenterCrop(self.size))

    def _finished(self, *steps: Any) -> Callable[[Any], Tensor]:
        from torchvision.transforms import v2

        composed: Callable[[Any], Tensor] = v2.Compose(
            [
                *steps,
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )
        return composed


class _Request(NamedTuple):
    """One sample of one batch: which image, and the seed of its augmentation (None for none)."""

    sample: int
    seed: int | None


class _Unreadable(NamedTuple):
    """Stands in a batch for an image that could not be read."""

    path: str
    reason: str


class _Samples(NamedTuple):
    """One batch as the workers hand it over, stacked so that the loader can pin it whole.

    Attributes:
        unreadable: images of the batch that are left out of the rest.
        read: inputs float32 ``[B, 3, S, S]``, targets and indices int64 ``[B]``; None if B is 0.
    """

    unreadable: list[_Unreadable]
    read: tuple[Tensor, Tensor, Tensor] | None


def _stack(samples: list[tuple[Tensor, int, int] | _Unreadable]) -> _Samples:
    """The samples of one batch together."""
    unreadable = [sample for sample in samples if isinstance(sample, _Unreadable)]
    read = [sample for sample in samples if not isinstance(sample, _Unreadable)]
    if not read:
        return _Samples(unreadable, None)
    inputs, targets, indices = zip(*read, strict=True)
    return _Samples(unreadable, (torch.stack(inputs), torch.tensor(targets), torch.tensor(indices)))


class _Reader(Dataset[Any]):
    """Runs in the workers: decodes and augments."""

    def __init__(self, root: Path, images: ImageList, preparation: Preparation) -> None:
        self.root = root
        self.images = images
        self.train = preparation.training()
        self.test = preparation.evaluation()

    def __getitem__(self, request: _Request) -> tuple[Tensor, int, int] | _Unreadable:
        from PIL import Image

        path = self.images.paths[request.sample]
        try:
            with Image.open(self.root / path) as opened:
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return _Unreadable(path, str(error))
        target = int(self.images.targets[request.sample])
        if request.seed is None:
            return self.test(image), target, request.sample
        # torchvision draws from the global generator only.
        with global_seed(request.seed):
            return self.train(image), target, request.sample


@dataclass(eq=False)
class FileImages:
    """A list of image files.

    An image's augmentation depends on seed, epoch and image alone, not on the number of workers.

    Attributes:
        root: folder that the paths are relative to.
        images: paths and classes.
        preparation: how files become tensors.
        workers: processes that read; 0 reads in this one.
        corrupt: ``stop`` ends the run at an image that cannot be read; ``skip`` leaves it out and
            counts it in ``unreadable``.
        unreadable: how often each unreadable image was met.
    """

    root: Path
    images: ImageList
    preparation: Preparation
    workers: int = 0
    corrupt: str = "stop"
    unreadable: dict[str, int] = field(default_factory=dict)

    @property
    def targets(self) -> NDArray[np.int64]:
        """Classes, int64 ``[N]``."""
        return self.images.targets

    @property
    def channels(self) -> int:
        """Images are read as RGB."""
        return 3

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self,
        order: Sequence[NDArray[np.int64]],
        *,
        augment: bool,
        seed: int,
        epoch: int,
        device: torch.device,
    ) -> Iterator[Batch]:
        """See :meth:`fastsam.longtail.data.Images.batches`.

        Raises:
            DataError: at an unreadable image under ``stop``, or a batch of nothing else.
        """
        if self.corrupt not in CORRUPT_POLICIES:
            raise UsageError(f"corrupt must be one of {', '.join(CORRUPT_POLICIES)}")
        requests = (
            [
                _Request(
                    int(i), derived_seed(seed, Stream.AUGMENT, epoch, int(i)) if augment else None
                )
                for i in batch
            ]
            for batch in order
        )
        loader: DataLoader[Any] = DataLoader(
            _Reader(self.root, self.images, self.preparation),
            batch_sampler=requests,
            num_workers=self.workers,
            collate_fn=_stack,
            pin_memory=device.type == "cuda",
            # Its own generator: the loader would otherwise advance the global one.
            generator=torch.Generator(),
        )
        for samples in loader:
            for image in samples.unreadable:
                self._note(image)
            if samples.read is not None:
                yield Batch(*(upload(tensor, device) for tensor in samples.read))

    def broken_files(self) -> list[str]:
        """Paths of the images that cannot be decoded; reads every file."""
        reader = _Reader(self.root, self.images, self.preparation)
        samples = (reader[_Request(index, None)] for index in range(len(self)))
        return [sample.path for sample in samples if isinstance(sample, _Unreadable)]

    def _note(self, sample: _Unreadable) -> None:
        if self.corrupt == "stop":
            raise DataError(
                f"{self.root / sample.path} cannot be read ({sample.reason}); replace the file, or "
                "go on without such images with --corrupt skip"
            )
        self.unreadable[sample.path] = self.unreadable.get(sample.path, 0) + 1
