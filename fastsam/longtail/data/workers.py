"""Processes that read image files: what they are asked for, what they do, how long they live."""

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
"""Makes the tensor ``[3, S, S]`` of an RGB image of Pillow, or of a tensor ``[3, H, W]`` in [0, 1]."""


SIGNAL_SECONDS = 0.2
"""How long the signal of a worker's death may come after its connection is lost."""


class Request(NamedTuple):
    """One batch to read.

    Attributes:
        samples: which images, int64 ``[B]``.
        draw: seed and epoch that the augmentation is drawn from; None for plain images.
    """

    samples: NDArray[np.int64]
    draw: tuple[int, int] | None = None


class Unreadable(NamedTuple):
    """Stands in a batch for an image that could not be read."""

    path: str
    reason: str


class Samples(NamedTuple):
    """One batch as the workers hand it over, stacked so that the loader can pin it whole.

    Attributes:
        unreadable: images of the batch that are left out of the rest.
        read: inputs float32 ``[B, 3, S, S]``, targets and indices int64 ``[B]``; None if B is 0.
    """

    unreadable: list[Unreadable]
    read: tuple[Tensor, Tensor, Tensor] | None


Sample = tuple[Tensor, int, int] | Unreadable
"""Input, target and index of an image, or the reason why there are none."""


def _stack(samples: list[Sample]) -> Samples:
    """The samples of one batch together."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    read = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not read:
        return Samples(unreadable, None)
    inputs, targets, indices = zip(*read, strict=True)
    return Samples(unreadable, (torch.stack(inputs), torch.tensor(targets), torch.tensor(indices)))


class Reader(Dataset[list[Sample]]):
    """Runs in the workers: decodes and prepares.

    An image's augmentation depends on seed, epoch and image alone.

    Args:
        root: folder that the paths are relative to.
        images: paths and classes.
        plain: what becomes of an image without augmentation.
        augmented: the same with it, drawn from torch's global generator.
        reading: how files become pixels.
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
        # torchvision draws from the global generator only.
        with global_seed(derived_seed(seed, Stream.AUGMENT, epoch, sample)):
            return self.augmented(image), target, sample


class Workers:
    """Processes that read for one set of images and live on from one reading to the next.

    They start at the first reading and end with :meth:`close`, or with this object. Readings may
    overlap (the two views of an epoch do), each with processes of its own; one that is broken off
    ends them.

    Args:
        reader: what they do: maps a :class:`Request` to its samples.
        count: how many processes a reading has; 0 reads in this one.
    """

    def __init__(self, reader: Dataset[list[Sample]], count: int) -> None:
        self.reader = reader
        self.count = count
        self._idle: dict[bool, list[_Loader]] = {True: [], False: []}

    def read(self, requests: Iterable[Request], *, pin: bool = False) -> Iterator[Samples]:
        """The batches that are asked for, in their order.

        Args:
            requests: one for each batch.
            pin: whether to hand them over in pinned memory, as a GPU is sent them.
        """
        idle = self._idle[pin]
        loader = idle.pop() if idle else _Loader(self.reader, self.count, pin)
        yield from loader.read(requests)
        idle.append(loader)

    def close(self) -> None:
        """End the processes that are not reading; another reading starts new ones."""
        for idle in self._idle.values():
            idle.clear()


class _Loader:
    """A loader that can be sent other requests each time, which torch's takes at its start."""

    def __init__(self, reader: Dataset[list[Sample]], workers: int, pin: bool) -> None:
        self._requests: list[Request] = []
        self._loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,  # a request is a batch already
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_stack,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=expect_lost_connections,
            # Its own generator: the loader would otherwise advance the global one.
            generator=torch.Generator(),
        )

    def read(self, requests: Iterable[Request]) -> Iterator[Samples]:
        self._requests[:] = requests
        with lost_workers_named():
            yield from self._loader


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn what torch raises where a worker of a ``DataLoader`` was killed into one error that says so.

    Raises:
        LongTailError: a worker ended before it had read its batch.
    """
    try:
        yield
    except (ConnectionError, EOFError, RuntimeError) as error:
        # Errors that a worker itself raised begin with "Caught".
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        # The connection may be lost before the signal of the worker's death arrives. Torch's handler then
        # raises in the main thread, wherever that is: wait for it here.
        with suppress(RuntimeError):
            time.sleep(SIGNAL_SECONDS)
        raise LongTailError(
            f"a process that reads images ended unexpectedly ({str(error).strip()}); if memory ran out, "
            "use fewer --workers"
        ) from error


def expect_lost_connections(worker: int) -> None:
    """Keep a worker silent when the main process ends before it has taken a batch.

    The thread of multiprocessing that hands batches over reports errors through ``sys.excepthook``.
    """

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
