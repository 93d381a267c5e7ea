"""Spectra computed by several ranks, each with a shard of the samples or of the probes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastsam.curvature.comparison import merge
from fastsam.curvature.data import Batches
from fastsam.curvature.spectrum import Spectrum
from fastsam.curvature.structure import common_length, map_tensors, sample_count
from fastsam.distributed import World

SHARDS = (None, "samples", "probes")


def sharded_world(shard: str | None) -> World:
    """Return the default process group if ``shard`` is set, else a world of this process alone.

    Raises:
        ValueError: ``shard`` is unknown, or there is no process group.
    """
    if shard not in SHARDS:
        raise ValueError(f"shard must be None, 'samples' or 'probes', got {shard!r}")
    if shard is None:
        return World()
    try:
        return World.from_process_group()
    except ValueError as error:
        raise ValueError(f"shard={shard!r} requires a process group, but {error}") from None


def shard_of_samples(batches: Batches, world: World, *, separable: bool) -> Batches:
    """Return this rank's part of every batch, or every world_size-th batch if one may not be split.

    Raises:
        ValueError: the data are not in memory, or differ between the ranks.
    """
    if not batches.held:
        raise ValueError("shard='samples' requires data in memory; raise data_memory")
    if not world.agree(batches.ordered_fingerprint()):
        raise ValueError(
            "the ranks read different data or another order of the data; every rank must pass the "
            "whole data in the same order (shuffle=False, or a loader with the same seeded generator)"
        )
    if not separable or any(common_length(batch) is None for batch in batches):
        own = [
            batch for number, batch in enumerate(batches) if number % world.world_size == world.rank
        ]
        return replace(batches, source=own)

    def part(batch: Any) -> list[Any]:
        rows = _own_range(sample_count(batch), world)
        cut = map_tensors(lambda tensor: tensor[rows.start : rows.stop], batch)
        return [cut] if rows else []

    return batches.mapped(part)


def shard_of_probes(indices: range, world: World) -> range:
    """Return the indices of this rank's probes.

    Raises:
        ValueError: there are fewer probes than ranks.
    """
    if len(indices) < world.world_size:
        raise ValueError(
            f"shard='probes' requires at least one probe per rank, got {len(indices)} probes for "
            f"{world.world_size} ranks; raise probes"
        )
    own = _own_range(len(indices), world)
    return indices[own.start : own.stop]


def _own_range(count: int, world: World) -> range:
    """Return this rank's part of ``range(count)``; the sizes of the parts differ by at most one."""
    bounds = np.linspace(0, count, world.world_size + 1).astype(int)
    return range(int(bounds[world.rank]), int(bounds[world.rank + 1]))


def gather_probes(spectrum: Spectrum, world: World) -> Spectrum:
    """Gather the probes of all ranks into one spectrum, on every rank."""
    whole = merge(world.all_gather(spectrum))
    indices = [index for run in whole.settings["merged"] for index in run["probe_indices"]]
    return replace(whole, settings={**spectrum.settings, "probe_indices": indices})
