"""Worker processes that read image files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.pixels import Reading, decode
from fastsam.longtail.errors import LongTailError
from fastsam.longtail.seeds import Stream, derived_seed, global_seed

Prepare = Callable[[Any], Tensor]
"""Maps an RGB Pillow image, or a tensor ``[3, H, W]`` in [0, 1], to a tensor ``[3, S, S]``."""


SIGNAL_SECONDS = 0.2
"""Longest time between the loss of a worker's connection and the signal of its death."""


class Request(NamedTuple):
    """A batch to read.

    Attributes:
        samples: indices of the images, int64 ``[B]``.
        draw: seed and epoch of the augmentation; None for clean images.
    """

    samples: NDArray[np.int64]
    draw: tuple[int, int] | None = None


class Unreadable(NamedTuple):
    """Placeholder in a batch for an image that could not be read."""

    path: str
    reason: str


class Samples(NamedTuple):
    """A batch that was read, stacked into tensors so that the loader can pin it.

    Attributes:
        unreadable: images that could not be read.
        read: inputs float32 ``[B, 3, S, S]``, targets and indices int64 ``[B]`` of the other images; None if
            B is 0.
    """

    unreadable: list[Unreadable]
    read: tuple[Tensor, Tensor, Tensor] | None


Sample = tuple[Tensor, int, int] | Unreadable
"""Input, target and index of an image, or the reason why it could not be read."""


def _stack(samples: list[Sample]) -> Samples:
    """Stack the samples of a batch."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    read = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not read:
        return Samples(unreadable, None)
    inputs, targets, indices = zip(*read, strict=True)
    return Samples(unreadable, (torch.stack(inputs), torch.tensor(targets), torch.tensor(indices)))


class Reader(Dataset[list[Sample]]):
    """Decodes and transforms images in the workers.

    The augmentation of an image depends only on seed, epoch and image.

    Args:
        root: folder that the paths are relative to.
        images: paths and classes.
        plain: transform without augmentation.
        augmented: transform with augmentation, which uses torch's global generator.
        reading: handling of EXIF orientation and pixel values.
    """

    def __init__(
        self,
        root: Path,
        images: ImageList,
        *,
        plain: Prepare,
        augmented: Prepare,
        reading: Reading = Reading(),  # noqa: B008 (immutable)
    ) -> None:
        self.root = root
        self.images = images
        self.plain = plain
        self.augmented = augmented
        self.reading = reading

    def __getitem__(self, request: Request) -> list[Sample]:
        return [self._read(sample, request.draw) for sample in request.samples.tolist()]

    def _read(self, sample: int, draw: tuple[int, int] | None) -> Sample:
        path = self.images.paths[sample]
        try:
            image = decode(self.root / path, self.reading).pixels
        except (OSError, ValueError) as error:
            return Unreadable(path, str(error))
        target = int(self.images.targets[sample])
        if draw is None:
            return self.plain(image), target, sample
        seed, epoch = draw
        # torchvision supports only the global generator.
        with global_seed(derived_seed(seed, Stream.AUGMENT, epoch, sample)):
            return self.augmented(image), target, sample


class Workers:
    """Persistent worker processes that read batches of images.

    Workers start at the first :meth:`read` and end with :meth:`close` or when this object is deleted. Several
    iterators may be active at a time, as for two views of an epoch. Each has its own workers, which end if
    the iterator is not exhausted.

    Args:
        reader: maps a :class:`Request` to its samples.
        count: number of worker processes per iterator; 0 reads in this process.
    """

    def __init__(self, reader: Dataset[list[Sample]], count: int) -> None:
        self.reader = reader
        self.count = count
        self._idle: dict[bool, list[_Loader]] = {True: [], False: []}

    def read(self, requests: Iterable[Request], *, pin: bool = False) -> Iterator[Samples]:
        """Iterate over the requested batches, in order.

        Args:
            requests: one request for each batch.
            pin: whether to return batches in pinned memory, for copies to a GPU.
        """
        idle = self._idle[pin]
        loader = idle.pop() if idle else _Loader(self.reader, self.count, pin)
        yield from loader.read(requests)
        idle.append(loader)

    def close(self) -> None:
        """Stop the workers that are idle. A later :meth:`read` starts new ones."""
        for idle in self._idle.values():
            idle.clear()


class _Loader:
    """A ``DataLoader`` with persistent workers that accepts new requests for each iteration."""

    def __init__(self, reader: Dataset[list[Sample]], workers: int, pin: bool) -> None:
        self._requests: list[Request] = []
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,  # each request is a batch
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=expect_lost_connections,
            # Without a generator the loader would advance torch's global generator.
            generator=torch.Generator(),
        )

    def read(self, requests: Iterable[Request]) -> Iterator[Samples]:
        self._requests[:] = requests
        with lost_workers_named():
            yield from self._loader


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Convert the errors that torch raises when a ``DataLoader`` worker was killed to one clear error.

    Raises:
        LongTailError: if a worker ended before it returned its batch.
    """
    try:
        yield
    except (ConnectionError, EOFError, RuntimeError) as error:
        # Exceptions raised inside a worker start with "Caught"; those pass through.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        # The connection can be lost before SIGCHLD arrives. Torch's signal handler then raises in the main
        # thread at an arbitrary place. Sleeping here makes it raise here, where it is suppressed.
        with suppress(RuntimeError):
            time.sleep(SIGNAL_SECONDS)
        raise LongTailError(
            f"a worker process that reads images ended unexpectedly ({str(error).strip()}); if memory ran "
            "out, lower --workers"
        ) from error


def expect_lost_connections(worker: int) -> None:
    """Suppress a worker's traceback when the main process ends before it has received a batch.

    The thread of multiprocessing that sends batches reports errors through ``sys.excepthook``.
    """

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
