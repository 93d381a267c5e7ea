"""Worker processes that read image files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsam.longtail.data.augment import ImageAugmentation
from fastsam.longtail.data.image_source import ImageSource
from fastsam.longtail.data.lists import ImageList
from fastsam.longtail.data.worker_count import prefetched
from fastsam.longtail.errors import LongTailError
from fastsam.longtail.seeds import SampleSeeds
from fastsam.stopping import outlast_parent_signals

Prepare = Callable[[Any], Tensor]
"""Maps an RGB Pillow image, or a tensor ``[3, H, W]`` in [0, 1], to pixels ``[C, S, S]``."""

SIGNAL_SECONDS = 0.2
"""Longest time between the loss of a worker's connection and the signal of its death."""


class Request(NamedTuple):
    """A batch to read.

    Attributes:
        samples: indices of the images, int64 ``[B]``.
        seeds: seeds of the augmentation, one per image; None for clean images.
    """

    samples: NDArray[np.int64]
    seeds: SampleSeeds | None = None


class Unreadable(NamedTuple):
    """Placeholder in a batch for an image that could not be read."""

    path: str
    reason: str


class Sample(NamedTuple):
    """An image that was read.

    Attributes:
        pixels: raw pixels ``[C, H, W]``: uint8, or float32 in [0, 1] for more than 8 bits per channel.
        target: class.
        place: index of the image.
    """

    pixels: Tensor
    target: int
    place: int


class Samples(NamedTuple):
    """The images of a batch that have the same dtype, stacked so that the loader can pin them.

    Attributes:
        pixels: raw pixels ``[M, C, H, W]``, uint8 or float32.
        targets: classes, int64 ``[M]``.
        indices: indices of the images, int64 ``[M]``.
        rows: places of the images in the request, in ascending order, int64 ``[M]``.
    """

    pixels: Tensor
    targets: Tensor
    indices: Tensor
    rows: NDArray[np.int64]


class ReadBatch(NamedTuple):
    """A batch that was read.

    Attributes:
        unreadable: images that could not be read.
        samples: the other images, one entry for each dtype.
        seeds: seeds of the request.
    """

    unreadable: list[Unreadable]
    samples: list[Samples]
    seeds: SampleSeeds | None


class ReadRequest(NamedTuple):
    """A request with its images in order, before they are stacked."""

    images: list[Sample | Unreadable]
    request: Request


def _stack(read: ReadRequest) -> ReadBatch:
    """Stack the images of a batch by dtype."""
    unreadable = [image for image in read.images if isinstance(image, Unreadable)]
    rows: dict[torch.dtype, list[int]] = {}
    for row, image in enumerate(read.images):
        if isinstance(image, Sample):
            rows.setdefault(image.pixels.dtype, []).append(row)
    samples = []
    for places in rows.values():
        images = [read.images[row] for row in places]
        pixels, targets, indices = zip(*images, strict=True)
        samples.append(
            Samples(
                torch.stack(pixels),
                torch.tensor(targets),
                torch.tensor(indices),
                np.array(places, np.int64),
            )
        )
    return ReadBatch(unreadable, samples, read.request.seeds)


class Reader(Dataset[ReadRequest]):
    """Decodes images in the workers, and makes the part of the augmentation that is per image.

    The augmentation of an image depends only on its seed.

    Args:
        source: where the images come from.
        images: paths and classes.
        plain: transform without augmentation.
        augmented: transform with augmentation; None for ``plain``.
        changed: augmentation of the transformed pixels; None for no change.
    """

    def __init__(
        self,
        source: ImageSource,
        images: ImageList,
        *,
        plain: Prepare,
        augmented: ImageAugmentation | None = None,
        changed: ImageAugmentation | None = None,
    ) -> None:
        self.source = source
        self.images = images
        self.plain = plain
        self.augmented = augmented
        self.changed = changed

    def __getitem__(self, request: Request) -> ReadRequest:
        samples = request.samples.tolist()
        return ReadRequest(
            [self._read(sample, row, request.seeds) for row, sample in enumerate(samples)], request
        )

    def _read(self, sample: int, row: int, seeds: SampleSeeds | None) -> Sample | Unreadable:
        path = self.images.paths[sample]
        try:
            if seeds is None or self.augmented is None:
                pixels = self.plain(self.source.picture(path))
            else:
                pixels = self.augmented(self.source.pixels(path), seeds.take(row))
        except (OSError, ValueError) as error:
            return Unreadable(path, str(error))
        if seeds is not None and self.changed is not None:
            pixels = self.changed(pixels, seeds.take(row))
        return Sample(pixels, int(self.images.targets[sample]), sample)


class Workers:
    """Persistent worker processes that read batches of images.

    Workers start at the first :meth:`read` and end with :meth:`close` or when this object is deleted. Several
    iterators may be active at a time, as for two views of an epoch. Each has its own workers, which end if
    the iterator is not exhausted.

    Args:
        reader: maps a :class:`Request` to its images.
        count: number of worker processes per iterator; 0 reads in this process.
    """

    def __init__(self, reader: Dataset[ReadRequest], count: int) -> None:
        self.reader = reader
        self.count = count
        self._idle: dict[bool, list[_Loader]] = {True: [], False: []}

    def read(self, requests: Iterable[Request], *, pin: bool = False) -> Iterator[ReadBatch]:
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

    def __init__(self, reader: Dataset[ReadRequest], workers: int, pin: bool) -> None:
        self._requests: list[Request] = []
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,  # each request is a batch
            sampler=self._requests,
            num_workers=workers,
            prefetch_factor=prefetched(workers),
            collate_fn=_stack,  # type: ignore[arg-type]  # it gets one request
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=prepare_worker,
            # Without a generator the loader would advance torch's global generator.
            generator=torch.Generator(),
        )

    def read(self, requests: Iterable[Request]) -> Iterator[ReadBatch]:
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


def prepare_worker(worker: int) -> None:
    """Let a worker process end with the main process: neither before it nor with a traceback.

    Args:
        worker: index of the worker, as torch passes it.
    """
    outlast_parent_signals()
    expect_lost_connections()


def expect_lost_connections() -> None:
    """Suppress a worker's traceback when the main process ends before it has received a batch.

    The thread of multiprocessing that sends batches reports errors through ``sys.excepthook``.
    """

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
