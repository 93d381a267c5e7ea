"""The data of an operator: verified by two reads and constant for the whole run."""

from __future__ import annotations

import copy
import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from fastsam.curvature.checks import check_count
from fastsam.curvature.holding import ReadBatches
from fastsam.curvature.memory import readable
from fastsam.curvature.randomness import Randomness, global_seed
from fastsam.curvature.structure import is_empty, sample_count, sample_digests, tensors_of

DATA_MEMORY = 2**31
"""Default limit on the bytes of batches that are held in main memory."""


@dataclass(frozen=True)
class Batches:
    """Batches that can be read any number of times.

    Every read of a verified loader that does not fit in memory starts from the same random state, so
    that the order is the same.

    Attributes:
        source: the batches, or the loader that yields them.
        held: whether ``source`` is a sequence in memory, so that every read yields the same objects.
        samples: total number of samples, with 1 for a batch without a common first dimension; 0 if
            they were not counted.
        fingerprint: hexadecimal checksum of all samples in any order; None if they were not checked.
        reads: indices of the coming reads, which seed the random numbers of a loader.
        may_draw: whether reading may use the global random generators.
    """

    source: Iterable[Any] | _Loader | _Mapped
    held: bool
    samples: int
    fingerprint: str | None
    reads: Iterator[int] = field(default_factory=lambda: itertools.repeat(0), compare=False)
    may_draw: bool = True

    def ordered_fingerprint(self) -> str:
        """Return a hexadecimal checksum of the batches that depends on their order."""
        checksum = hashlib.blake2b(digest_size=16)
        for batch in self:
            checksum.update(_fingerprint(Counter(sample_digests(batch))).encode())
        return checksum.hexdigest()

    def mapped(self, function: Callable[[Any], Iterable[Any]]) -> Batches:
        """Return the batches with each replaced by the batches that ``function`` returns for it."""
        if isinstance(self.source, (_Loader, _Mapped)):
            return replace(self, source=_Mapped(self.source, function))
        return replace(self, source=[item for batch in self for item in function(batch)])

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.source, (_Loader, _Mapped)):
            number = next(self.reads)
            streams = self.source.streams(number) if self.may_draw else None
            yield from self.source.read(number, streams)
        else:
            yield from self.source


def one_batch(batch: Any) -> Batches:
    """Wrap a single batch, without checks."""
    return Batches([batch], held=True, samples=sample_count(batch), fingerprint=None)


@dataclass(frozen=True)
class _Loader:
    """A loader whose random generators, and the global ones, are replaced while it is read.

    Every read of one index thus yields the same batches, and the user's generators do not change.

    Attributes:
        data: iterable that yields the batches.
        seed: seed of all replacements.
        states: states of the loader's generators, by their ``id``.
    """

    data: Iterable[Any]
    seed: int
    states: Mapping[int, Tensor]

    @classmethod
    def of(cls, data: Iterable[Any]) -> _Loader:
        """Wrap a loader in its current state, without drawing from its generators."""
        owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        own = [generator for generator in found if isinstance(generator, torch.Generator)]
        states = {id(generator): generator.get_state() for generator in own}
        return cls(data, global_seed(*own), states)

    def read(self, number: int, streams: Randomness | None) -> Iterator[Any]:
        """Yield the batches with samples; two reads of one index yield the same order and random numbers.

        Args:
            number: index of the read.
            streams: replacements of the global generators; None if the loader does not use them.
        """
        twin = self._twin(number)
        with nullcontext() if streams is None else streams.active():
            iterator = iter(twin)
        end = object()
        while True:
            with nullcontext() if streams is None else streams.active():
                batch = next(iterator, end)
            if batch is end:
                return
            if not is_empty(batch):
                yield batch

    def streams(self, number: int) -> Randomness:
        """Return the replacements of the global generators for one read."""
        return Randomness(self._seed_of(number))

    def _twin(self, number: int) -> Iterable[Any]:
        """Return a copy of the loader with other generators, or the loader if it has none."""
        data = self.data
        if not isinstance(data, DataLoader):
            own = isinstance(getattr(data, "generator", None), torch.Generator)
            return self._with_generator(data, number) if own else data
        sampler = self._with_generator(data.sampler, number)
        batch_sampler: Any = data.batch_sampler
        if getattr(batch_sampler, "sampler", None) is data.sampler:
            batch_sampler = copy.copy(batch_sampler)
            batch_sampler.sampler = sampler
        else:
            batch_sampler = self._with_generator(batch_sampler, number)
        twin = copy.copy(data)
        # Through vars(), because a DataLoader rejects the assignment of another sampler.
        vars(twin).update(
            sampler=sampler,
            batch_sampler=batch_sampler,
            generator=self._generator(data.generator, number),
            _iterator=None,
        )
        return twin

    def _with_generator(self, owner: Any, number: int) -> Any:
        if not hasattr(owner, "generator") or isinstance(owner, Iterator):
            return owner
        twin = copy.copy(owner)
        twin.generator = self._generator(owner.generator, number)
        return twin

    def _generator(self, original: Any, number: int) -> torch.Generator:
        """Return a replacement generator; for read 0 in the original's state, to keep its order."""
        twin = torch.Generator()
        if number == 0 and id(original) in self.states:
            return twin.set_state(self.states[id(original)])
        return twin.manual_seed(self._seed_of(number))

    def _seed_of(self, number: int) -> int:
        digest = hashlib.blake2b(f"{self.seed} {number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class _Mapped:
    source: _Loader | _Mapped
    function: Callable[[Any], Iterable[Any]]

    def read(self, number: int, streams: Randomness | None) -> Iterator[Any]:
        for batch in self.source.read(number, streams):
            yield from self.function(batch)

    def streams(self, number: int) -> Randomness:
        return self.source.streams(number)


def is_single_batch(data: Any) -> bool:
    """Return whether ``data`` is a single batch and not an iterable of batches.

    A batch is a tuple, a mapping, a list that begins with a tensor, or an object with tensors. An
    object that is iterable is a batch only if it yields its tensors.
    """
    if isinstance(data, (tuple, Mapping)):
        return True
    if isinstance(data, list):
        return len(data) > 0 and isinstance(data[0], Tensor)
    if isinstance(data, (Tensor, Dataset, DataLoader, Iterator, Batches, nn.Module)):
        return False
    if not hasattr(data, "__iter__") or callable(getattr(data, "to", None)):
        return bool(tensors_of(data))
    own = [
        id(value) for value in getattr(data, "__dict__", {}).values() if isinstance(value, Tensor)
    ]
    return bool(own) and id(next(iter(data), None)) in own


def read_batches(
    data: Any,
    *,
    freeze: int | None = None,
    verify: bool = True,
    memory_limit: int = DATA_MEMORY,
) -> Batches:
    """Read and verify ``data`` as described in :func:`fastsam.spectral_density`.

    Args:
        data: one batch, or an iterable of batches. A :class:`Batches` object is returned unchanged.
        freeze: number of reads of the iterable to hold, so that random augmentation becomes a fixed
            set of copies of each sample.
        verify: whether to read an iterable twice and reject samples that change. With False it is
            read again, without checks, at every product.
        memory_limit: bytes of batches that may be held in memory.

    Raises:
        TypeError: ``data`` is neither a batch nor an iterable of batches, or a batch has no tensor.
        ValueError: there is no batch, samples differ between two reads, or a one-shot iterator
            exceeds ``memory_limit`` or cannot be read ``freeze`` times.
    """
    if freeze is not None:
        check_count("freeze", freeze, unit="reads of the data")
    check_count("data_memory", memory_limit, least=0, unit="bytes")
    if isinstance(data, Batches):
        return data
    if is_single_batch(data):
        return _held([data])
    if isinstance(data, (Tensor, nn.Module)) or (
        not hasattr(data, "__iter__") and not isinstance(data, Dataset)
    ):
        raise TypeError(
            "data must be one batch (a tuple, a dict, an object with tensors, or a list that begins "
            f"with a tensor) or an iterable of batches, got {type(data).__name__}"
        )
    map_style = isinstance(data, Dataset) and not hasattr(data, "__iter__")
    if map_style:
        raise TypeError(
            f"data is a dataset ({type(data).__name__}), which yields single samples; "
            "pass torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if isinstance(data, (list, tuple)):
        return _held(list(data))  # the batches of a list do not change, so freeze has no effect
    if isinstance(data, Iterator):
        if freeze is not None and freeze > 1:
            raise ValueError(
                f"freeze={freeze} requires data that can be read {freeze} times, but data is a "
                "one-shot iterator; pass the object it iterates over (a DataLoader), or freeze=1"
            )
        return _read_once(data, memory_limit=memory_limit)
    loader = _Loader.of(data)
    if freeze is not None:
        return _freeze(loader, reads=freeze, memory_limit=memory_limit)
    if not verify:
        return Batches(loader, held=False, samples=0, fingerprint=None, reads=itertools.count())
    return _verified(loader, memory_limit=memory_limit)


def _held(batches: Sequence[Any]) -> Batches:
    read = ReadBatches(sys.maxsize)
    for batch in batches:
        read.add(batch)
    return _of_read(read)


def _read_once(data: Iterator[Any], *, memory_limit: int) -> Batches:
    loader = _Loader.of(data)
    read = ReadBatches(memory_limit)
    for batch in loader.read(0, loader.streams(0)):
        read.add(batch)
        if read.held is None:
            raise ValueError(
                f"data is a one-shot iterator of more than {readable(memory_limit)} and cannot be "
                "held in memory. Pass an iterable that can be read again (a DataLoader), pass fewer "
                "batches, or raise data_memory"
            )
    if read.is_overwritten():
        raise ValueError(
            "data is a one-shot iterator that overwrites its earlier batches: it fills the same "
            "memory for every batch. Yield copies (tensor.clone()), or pass an iterable that can be "
            "read again"
        )
    return _of_read(read)


def _freeze(loader: _Loader, *, reads: int, memory_limit: int, copied: bool = False) -> Batches:
    read = ReadBatches(memory_limit, copied=copied)
    for number in range(reads):
        for batch in loader.read(number, loader.streams(number)):
            read.add(batch)
            if read.held is None:
                raise ValueError(
                    f"freeze={reads} needs more than {readable(memory_limit)}; lower freeze, use "
                    "fewer samples, or raise data_memory"
                )
    if read.is_overwritten():
        return _freeze(loader, reads=reads, memory_limit=memory_limit, copied=True)
    return _of_read(read)


def _verified(loader: _Loader, *, memory_limit: int) -> Batches:
    first = ReadBatches(memory_limit)
    streams = loader.streams(0)
    for batch in loader.read(0, streams):
        first.add(batch)
    if first.is_overwritten():
        first.held = None
        second = ReadBatches(memory_limit, copied=True)
    else:
        second = ReadBatches(0)
    for batch in loader.read(1, loader.streams(1)):
        second.add(batch)
    if first.digests != second.digests:
        changed = (first.digests - second.digests).total()
        raise ValueError(
            f"{changed} of {first.digests.total()} samples differ between two reads of data, so every "
            "product would use another operator and the spectrum would be wrong. "
            f"{_cause_of_change(loader.data, changed)}, or pass freeze=K to hold K reads of the data"
        )
    held = second.held if first.held is None else first.held
    return replace(
        _of_read(first),
        source=loader if held is None else held,
        held=held is not None,
        may_draw=streams.drawn,
    )


def _of_read(read: ReadBatches) -> Batches:
    if not read.digests:
        raise ValueError("data has no batch with samples; pass at least one")
    return Batches(
        read.held or [], held=True, samples=read.samples, fingerprint=_fingerprint(read.digests)
    )


def _cause_of_change(data: Any, changed: int) -> str:
    """Return the likely reason why samples change between reads, and the fix."""
    if isinstance(data, DataLoader):
        sampler: Any = data.sampler
        kind = type(sampler).__name__
        picks = getattr(sampler, "num_samples", None)
        dataset_size = len(data.dataset) if hasattr(data.dataset, "__len__") else None
        if isinstance(sampler, (RandomSampler, WeightedRandomSampler)) and (
            sampler.replacement or picks != dataset_size
        ):
            return (
                f"Its {kind} draws {picks} new samples at every read: use a sampler that reads every "
                "sample once"
            )
        drop_last = getattr(data.batch_sampler, "drop_last", data.drop_last)
        size = getattr(data.batch_sampler, "batch_size", data.batch_size)
        shuffled = not isinstance(sampler, SequentialSampler)
        if drop_last and shuffled and size and hasattr(sampler, "__len__"):
            left_out = len(sampler) % size
            if changed <= left_out:
                return (
                    f"drop_last=True with a {kind} leaves {left_out} other samples out at every "
                    "read: set drop_last=False or shuffle=False"
                )
    return "Turn random augmentation off"


def _fingerprint(checksums: Counter[bytes]) -> str:
    checksum = hashlib.blake2b(digest_size=16)
    for digest, count in sorted(checksums.items()):
        checksum.update(digest + count.to_bytes(8, "little"))
    return checksum.hexdigest()
