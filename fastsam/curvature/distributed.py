"""One spectrum from several processes: samples or probes shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from fastsam.curvature.comparison import merge
from fastsam.curvature.data import Batches
from fastsam.curvature.spectrum import Spectrum
from fastsam.curvature.structure import map_tensors, sample_count

SHARDS = (None, "samples", "probes")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, shard: str | None) -> Ranks:
        """The default process group where something is shared out, else this process alone.

        Raises:
            ValueError: an unknown word, or no process group.
        """
        if shard not in SHARDS:
            raise ValueError(f"shard must be None, 'samples' or 'probes', got {shard!r}")
        if shard is None:
            return cls()
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                f"shard={shard!r} needs a process group: start the program with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        return cls(dist.get_rank(), dist.get_world_size())

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value: str | None) -> bool:
        """Whether all ranks have the same value."""
        found: list[str | None] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return len(set(found)) == 1

    def reducer(self) -> Callable[[Tensor], Tensor]:
        """A function that adds a tensor up over the ranks."""
        return _add_up if self.size > 1 else _leave


def _add_up(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _leave(tensor: Tensor) -> Tensor:
    return tensor


def share_of_samples(batches: Batches, ranks: Ranks, *, separable: bool) -> Batches:
    """This rank's part of every batch, or whole batches in turn where they may not be cut.

    Raises:
        ValueError: the data are not in memory, or differ between the ranks.
    """
    if not batches.held:
        raise ValueError("shard='samples' needs data that is held in memory; raise data_memory")
    if not ranks.agree(batches.ordered_fingerprint()):
        raise ValueError(
            "the ranks read different data, or the same in another order; every rank must pass "
            "the whole "
            "data in the same order (shuffle=False, or a loader with the same seeded generator)"
        )
    if not separable:
        own = [batch for number, batch in enumerate(batches) if number % ranks.size == ranks.rank]
        return replace(batches, source=own)

    def part(batch: Any) -> list[Any]:
        bounds = np.linspace(0, sample_count(batch), ranks.size + 1).astype(int)
        first, last = int(bounds[ranks.rank]), int(bounds[ranks.rank + 1])
        return [map_tensors(lambda tensor: tensor[first:last], batch)] if last > first else []

    return batches.mapped(part)


def share_of_probes(indices: range, ranks: Ranks) -> range:
    """This rank's probes.

    Raises:
        ValueError: fewer probes than ranks.
    """
    if len(indices) < ranks.size:
        raise ValueError(
            f"shard='probes' needs at least one probe per rank: {len(indices)} probes, "
            f"{ranks.size} ranks"
        )
    bounds = np.linspace(0, len(indices), ranks.size + 1).astype(int)
    return indices[int(bounds[ranks.rank]) : int(bounds[ranks.rank + 1])]


def gather_probes(spectrum: Spectrum, ranks: Ranks) -> Spectrum:
    """All ranks' probes as one spectrum, on every rank."""
    parts: list[Spectrum | None] = [None] * ranks.size
    dist.all_gather_object(parts, spectrum)
    whole = merge([part for part in parts if part is not None])
    indices = [index for run in whole.settings["merged"] for index in run["probe_indices"]]
    return replace(whole, settings={**spectrum.settings, "probe_indices": indices})
