"""Types of the keyword arguments of functions that pass the options of a run on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import torch

from fastsam.curvature.lanczos import Reorthogonalize
from fastsam.curvature.planning import Measurements


class RunOptions(TypedDict, total=False):
    """Options of every run, documented in :class:`fastsam.curvature.lanczos.LanczosSettings`."""

    steps: int
    probes: int
    seed: int
    probe_indices: range | None
    reorthogonalize: Reorthogonalize
    tolerance: float | None
    basis: str | Path
    checkpoint: str | Path | None
    checkpoint_interval: float
    memory_limit: int | None
    progress: bool
    description: str


class LanczosOptions(RunOptions, total=False):
    """All options of :class:`fastsam.curvature.lanczos.LanczosSettings`, for runs on any operator.

    For a model, ``verify_data`` replaces ``verify_symmetry``.
    """

    verify_symmetry: bool
    writes_checkpoint: bool


class ModelOptions(TypedDict, total=False):
    """Options of the operator of a model, documented in :func:`fastsam.spectral_density`."""

    curvature: str
    params: Iterable[str] | None
    dtype: torch.dtype | None
    strategy: str
    micro_batch: int | None
    freeze: int | None
    verify_data: bool
    data_memory: int
    shard: str | None
    measurements: Measurements | None


class SpectrumOptions(RunOptions, ModelOptions, total=False):
    """All options of :func:`fastsam.spectral_density`."""
