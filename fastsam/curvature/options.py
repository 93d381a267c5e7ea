"""Options of spectra of models, documented once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from fastsam.curvature.data import DATA_MEMORY
from fastsam.curvature.lanczos.options import LanczosKeywords, LanczosOptions
from fastsam.curvature.products.planning import Measurements
from fastsam.curvature.products.strategies import Strategy

Shard = Literal["samples", "probes"]


@dataclass(frozen=True, kw_only=True)
class SpectrumOptions(LanczosOptions):
    """Options of :func:`fastsam.spectral_density`: those of a Lanczos run, and these.

    Attributes:
        kind: curvature matrix. ``"hessian"`` (default); ``"ggn"``, the generalized Gauss-Newton
            matrix: the Hessian of the loss with the model linearized in its parameters;
            ``"empirical-fisher"``, ``sum(w_i g_i g_i') / sum(w_i)`` over the gradients g_i of the
            samples' losses; ``"mc-fisher"``, the same with one target per sample drawn from the
            model's predictive distribution, an unbiased estimate of the Fisher matrix, which equals
            the Gauss-Newton matrix for cross-entropy.
        params: names of parameters or layers. Default None: all that require a gradient.
        dtype: dtype of weights, data and vectors: torch.float32 or torch.float64. Default None: that
            of the parameters, at least float32.
        strategy: method for the products, described in :mod:`fastsam.curvature.products.strategies`.
            Default ``"auto"``: the fastest by predicted time among those that fit in memory and agree
            with the kept graph. ``Spectrum.settings`` records the choice, which is the only source
            of rounding differences between equal calls.
        micro_batch: maximum number of samples in one pass; larger batches are split. Default None:
            split only if memory requires it.
        freeze: number of copies of every sample to hold in memory, for a loader whose samples change
            at every read.
        verify_data: whether to compare two reads of the data, and the operator with its transpose.
            With False, the data is read again at every product. With random augmentation the result
            is then *wrong*: noise makes the Ritz values symmetric about 0.
        data_memory: bytes of batches that may be held in main memory; the batches of a larger loader
            are read at every product. Default 2 GiB.
        shard: under torchrun, ``"samples"`` splits every batch over the ranks and ``"probes"`` splits
            the probes. Every rank passes the whole data and gets the whole spectrum.
        measurements: object to share between calls with the same model and loss, so that the
            measurements for the choice of the strategy are made once. Runs over classes and groups
            share one.
    """

    kind: str = "hessian"
    params: Iterable[str] | None = None
    dtype: torch.dtype | None = None
    strategy: Strategy = "auto"
    micro_batch: int | None = None
    freeze: int | None = None
    verify_data: bool = True
    data_memory: int = DATA_MEMORY
    shard: Shard | None = None
    measurements: Measurements | None = None

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for invalid options, before the run begins."""
        super().__post_init__()
        if self.stop is not None and self.shard is not None:
            raise ValueError(
                f"stop cannot be combined with shard={self.shard!r}, because a signal to one rank would "
                "leave the others waiting; omit stop: a killed run continues from its checkpoint"
            )
        if not self.verify_data:
            object.__setattr__(self, "verify_symmetry", False)


class OperatorKeywords(TypedDict, total=False):
    """Fields of :class:`SpectrumOptions` that describe the operator, as keyword arguments."""

    kind: str
    params: Iterable[str] | None
    dtype: torch.dtype | None
    strategy: Strategy
    micro_batch: int | None
    freeze: int | None
    verify_data: bool
    data_memory: int
    memory_limit: int | None
    basis: str | Path
    shard: Shard | None
    measurements: Measurements | None


class SpectrumKeywords(LanczosKeywords, OperatorKeywords, total=False):
    """All fields of :class:`SpectrumOptions` as keyword arguments, for type checkers."""


def operator_options(options: OperatorKeywords, **own: Any) -> SpectrumOptions:
    """Return options that describe the operator, completed by ``own``.

    Raises:
        TypeError: an option belongs to a Lanczos run.
    """
    unknown = sorted(set(options) - set(OperatorKeywords.__annotations__))
    if unknown:
        raise TypeError(
            f"unexpected option {unknown[0]!r}; an operator has "
            f"{', '.join(sorted(OperatorKeywords.__annotations__))}"
        )
    return SpectrumOptions(**options, **own)
