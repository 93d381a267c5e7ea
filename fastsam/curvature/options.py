"""The options of a run as keyword arguments, for calls that pass them on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import torch

from fastsam.curvature.lanczos import Reorthogonalize
from fastsam.curvature.planning import Measurements


class RunOptions(TypedDict, total=False):
    """Options of every run; :class:`fastsam.curvature.lanczos.LanczosSettings` describes each."""

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
    """All options of :class:`fastsam.curvature.lanczos.LanczosSettings`, of runs on any operator.

    For a model ``verify_data`` says whether symmetry is verified, too.
    """

    verify_symmetry: bool
    writes_checkpoint: bool


class ModelOptions(TypedDict, total=False):
    """What an operator of a model is made of; :func:`fastsam.spectral_density` describes each."""

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
