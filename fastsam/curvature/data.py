"""The data of one operator: read twice, compared by sample, held still for the whole run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastsam.curvature.isolation import preserved_random_state

DATA_MEMORY = 2**31
"""Bytes of batches that are held in main memory unless a call says otherwise."""


@dataclass(frozen=True)
class Batches:
    """Batches that can be read any number of times.

    A verified loader that does not fit into memory starts every read from the same random state, so
    that it yields the same order each time.

    Attributes:
        source: the batches, or the loader that yields them.
        held: True where ``source`` is a sequence in memory, so that every read gives the same
            objects.
        samples: number of samples in all (of batches where a batch has no common first dimension),
            0 where nothing was counted.
        fingerprint: hexadecimal checksum of all samples whatever their order; None where unchecked.
    """

    source: Iterable[Any]
    held: bool
    samples: int
    fingerprint: str | None

    def ordered_fingerprint(self) -> str:
        """Hexadecimal checksum of the batches in their order."""
        checksum = hashlib.blake2b(digest_size=16)
        for batch in self:
            checksum.update(_fingerprint(_checksums([batch])).encode())
        return checksum.hexdigest()

    def mapped(self, function: Callable[[Any], Iterable[Any]]) -> Batches:
        """Every batch replaced by the batches that ``function`` makes of it."""
        if self.held:
            return replace(self, source=[item for batch in self for item in function(batch)])
        return replace(self, source=_Mapped(self.source, function))

    def __iter__(self) -> Iterator[Any]:
        if self.held or self.fingerprint is None:
            yield from self.source
        else:
            with preserved_random_state(), _PreservedGenerators(self.source):
                yield from self.source


@dataclass(frozen=True)
class _Mapped:
    source: Iterable[Any]
    function: Callable[[Any], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source:
            yield from self.function(batch)


def is_single_batch(data: Any) -> bool:
    """Whether data is one batch: a tuple, a mapping, or a list that begins with a tensor."""
    if isinstance(data, (tuple, Mapping)):
        return True
    return isinstance(data, list) and len(data) > 0 and isinstance(data[0], Tensor)


def read_batches(
    data: Any,
    *,
    freeze: int | None = None,
    verify: bool = True,
    memory_limit: int = DATA_MEMORY,
) -> Batches:
    """Read ``data`` as :func:`fastsam.spectral_density` describes.

    Args:
        data: one batch, or an iterable of batches; what was read already stays as it is.
        freeze: cache this many reads of the iterable, so that random augmentation becomes a fixed
            set of draws per sample.
        verify: read an iterable twice and refuse samples that change. With False it is read anew,
            unchecked, at every product.
        memory_limit: bytes of batches that may be held in memory.

    Raises:
        TypeError: ``data`` is neither a batch nor an iterable of batches.
        ValueError: no batch, samples that differ between two reads, or a one-shot iterator that
            does not fit into ``memory_limit`` or of which several draws are wanted.
    """
    if freeze is not None and freeze < 1:
        raise ValueError(f"freeze must be at least 1 (draws per sample), got {freeze}")
    if isinstance(data, Batches):
        return data
    if is_single_batch(data):
        return _held([data])
    if isinstance(data, Tensor) or (
        not hasattr(data, "__iter__") and not isinstance(data, Dataset)
    ):
        raise TypeError(
            "data must be one batch (a tuple, a dict, or a list that begins with a tensor) or an "
            "iterable of batches, "
            f"got {type(data).__name__}"
        )
    map_style = isinstance(data, Dataset) and not hasattr(data, "__iter__")
    if map_style:
        raise TypeError(
            f"data is a dataset ({type(data).__name__}), which yields single samples; "
            "pass torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if isinstance(data, (list, tuple)):
        return _held(list(data))  # a list does not change, so there is nothing to freeze
    with preserved_random_state(), _PreservedGenerators(data):
        if isinstance(data, Iterator):
            if freeze is not None and freeze > 1:
                raise ValueError(
                    f"freeze={freeze} needs data that can be read {freeze} times, and data is a "
                    "one-shot iterator; pass what it iterates over (a DataLoader), or freeze=1"
                )
            return _read_once(data, memory_limit=memory_limit)
        if freeze is not None:
            return _freeze(data, draws=freeze, memory_limit=memory_limit)
        if not verify:
            return Batches(source=data, held=False, samples=0, fingerprint=None)
        return _verified(data, memory_limit=memory_limit)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """``batch`` with ``function`` applied to every tensor in its tuples, lists and mappings."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, item) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, item) for item in batch)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in a batch's tuples, lists and mappings, in order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, batch)
    return found


def sample_count(batch: Any) -> int:
    """The first dimension shared by all tensors of a batch, or 1 where there is none."""
    lengths = {tensor.shape[0] if tensor.ndim else None for tensor in tensors_of(batch)}
    if len(lengths) == 1:
        return lengths.pop() or 1
    return 1


def _held(batches: Sequence[Any]) -> Batches:
    if not batches:
        raise ValueError("data holds no batch")
    return Batches(
        source=batches,
        held=True,
        samples=sum(sample_count(batch) for batch in batches),
        fingerprint=_fingerprint(_checksums(batches)),
    )


def _read_once(data: Iterator[Any], *, memory_limit: int) -> Batches:
    batches: list[Any] = []
    size = 0
    for batch in data:
        size += _bytes_of(batch)
        if size > memory_limit:
            raise ValueError(
                f"data is a one-shot iterator of more than {memory_limit / 2**30:.1f} GiB: too "
                "large to hold. "
                "Pass something that can be read again (a DataLoader) or fewer batches"
            )
        batches.append(batch)
    return _held(batches)


def _freeze(data: Iterable[Any], *, draws: int, memory_limit: int) -> Batches:
    batches: list[Any] = []
    size = 0
    for _ in range(draws):
        for batch in data:
            size += _bytes_of(batch)
            if size > memory_limit:
                raise ValueError(
                    f"freeze={draws} needs more than {memory_limit / 2**30:.1f} GiB; use fewer "
                    "draws or fewer samples"
                )
            batches.append(batch)
    return _held(batches)


def _verified(data: Iterable[Any], *, memory_limit: int) -> Batches:
    held: list[Any] | None = []
    first: Counter[bytes] = Counter()
    size = samples = 0
    for batch in data:
        first.update(_checksums([batch]))
        samples += sample_count(batch)
        size += _bytes_of(batch)
        if size > memory_limit:
            held = None
        if held is not None:
            held.append(batch)
    if not first:
        raise ValueError("data holds no batch")
    second = _checksums(data)
    if first != second:
        changed = (first - second).total()
        raise ValueError(
            f"{changed} of {first.total()} samples differ between two reads of data (random "
            "augmentation?), so that "
            "every product would use another operator and the spectrum would be wrong. Turn the "
            "augmentation "
            "off, or pass freeze=K to hold K draws of every sample"
        )
    return Batches(
        source=data if held is None else held,
        held=held is not None,
        samples=samples,
        fingerprint=_fingerprint(first),
    )


def _checksums(batches: Iterable[Any]) -> Counter[bytes]:
    """Checksums with their counts: of samples, or of batches that cannot be cut into samples."""
    found: Counter[bytes] = Counter()
    for batch in batches:
        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors_of(batch)]
        lengths = {tensor.shape[0] if tensor.ndim else None for tensor in tensors}
        if len(lengths) == 1 and None not in lengths:
            columns = [_bytes(tensor).reshape(len(tensor), -1) for tensor in tensors if len(tensor)]
            for sample in zip(*columns, strict=True):
                found[_digest(sample)] += 1
        else:
            found[_digest([_bytes(tensor).reshape(-1) for tensor in tensors])] += 1
    return found


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor) if tensor.ndim else 1, -1).view(torch.uint8)


def _digest(parts: Iterable[Tensor]) -> bytes:
    checksum = hashlib.blake2b(digest_size=16)
    for part in parts:
        checksum.update(part.numpy())  # type: ignore[arg-type]
    return checksum.digest()


def _fingerprint(checksums: Counter[bytes]) -> str:
    checksum = hashlib.blake2b(digest_size=16)
    for digest, count in sorted(checksums.items()):
        checksum.update(digest + count.to_bytes(8, "little"))
    return checksum.hexdigest()


def _bytes_of(batch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))


class _PreservedGenerators:
    """Restore the generators that a DataLoader and its sampler own."""

    def __init__(self, data: Any) -> None:
        data = data.source if isinstance(data, _Mapped) else data
        owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
        found = (getattr(owner, "generator", None) for owner in owners)
        self._states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for generator, state in self._states:
            generator.set_state(state)
