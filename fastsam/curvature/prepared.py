"""Preparation of a run on a model: its operator and settings from the options of a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastsam.curvature.checkpoint import LanczosCheckpoint
from fastsam.curvature.data import DATA_MEMORY, Batches, read_batches
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.lanczos import LanczosSettings, lanczos
from fastsam.curvature.losses import BatchLoss, LossFunction
from fastsam.curvature.memory import readable
from fastsam.curvature.model import ModelOperator
from fastsam.curvature.operators import AsymmetryError, ResolutionError
from fastsam.curvature.planning import Measurements
from fastsam.curvature.sharding import shard_of_probes, sharded_world
from fastsam.distributed import World
from fastsam.threads import cpu_threads

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastsam.curvature.options import SpectrumOptions


@dataclass(frozen=True)
class PreparedRun:
    """A run on a model that is ready to start.

    Attributes:
        operator: the curvature, with a chosen strategy.
        settings: settings of the Lanczos run of this rank.
        batches: the data.
        world: the ranks of the run.
    """

    operator: ModelOperator
    settings: LanczosSettings
    batches: Batches
    world: World


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Options of the operator of a model, documented in :func:`fastsam.spectral_density`."""

    curvature: str = "hessian"
    params: Iterable[str] | None = None
    dtype: torch.dtype | None = None
    strategy: str = "auto"
    micro_batch: int | None = None
    freeze: int | None = None
    verify_data: bool = True
    data_memory: int = DATA_MEMORY
    shard: str | None = None
    measurements: Measurements | None = None

    @classmethod
    def split(cls, options: SpectrumOptions) -> tuple[ModelSettings, LanczosSettings]:
        """Split the options of a call into those of the operator and those of the Lanczos run."""
        rest: dict[str, Any] = {**options}
        own = {item.name: rest.pop(item.name) for item in fields(cls) if item.name in rest}
        chosen = cls(**own)
        return chosen, LanczosSettings(**rest, verify_symmetry=chosen.verify_data)


@contextmanager
def prepared_run(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    data: Any,
    **options: Unpack[SpectrumOptions],
) -> Iterator[PreparedRun]:
    """Prepare a run with the options of :func:`fastsam.spectral_density`, and isolate the context.

    If the checkpoint folder contains a run, its strategy, passes and number of threads are reused,
    because they determine the bits.

    Raises:
        TypeError, ValueError: as in :func:`fastsam.spectral_density`.
    """
    chosen, settings = ModelSettings.split(options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    world = sharded_world(chosen.shard)
    if chosen.shard == "probes":
        settings = replace(settings, probe_indices=shard_of_probes(settings.indices, world))
    settings = replace(settings, progress=settings.progress and world.rank == 0)
    earlier = None
    if settings.checkpoint is not None:
        folder = _own_folder(Path(settings.checkpoint), chosen.shard, world)
        writes = chosen.shard == "probes" or world.rank == 0
        settings = replace(settings, checkpoint=folder, writes_checkpoint=writes)
        earlier = LanczosCheckpoint.identity_of(folder)
    threads = None if earlier is None else earlier.get("threads")
    with undisturbed(model, repeatable=settings.checkpoint is not None), cpu_threads(threads):
        kept = None
        batches = read_batches(
            data, freeze=chosen.freeze, verify=chosen.verify_data, memory_limit=chosen.data_memory
        )
        if earlier is not None and chosen.strategy == "auto" and "strategy" in earlier:
            chosen = replace(
                chosen, strategy=earlier["strategy"], micro_batch=earlier["micro_batch"]
            )
            kept = earlier.get("kept")
        make_operator = partial(
            ModelOperator,
            model,
            loss_fn,
            batches,
            curvature=chosen.curvature,
            seed=settings.seed,
            world=world if chosen.shard == "samples" else World(),
        )
        operator = make_operator(
            params=chosen.params,
            dtype=chosen.dtype,
            strategy=chosen.strategy,
            micro_batch=chosen.micro_batch,
            kept=kept,
        )
        operator.prepare(
            probes=len(settings.indices),
            steps=min(settings.steps, operator.shape[0]),
            memory_limit=settings.memory_limit,
            reserved=settings.basis_bytes(operator) if settings.basis == "device" else 0,
            measurements=chosen.measurements,
        )
        size, seconds = operator.predicted_bytes, operator.predicted_seconds
        if size is not None and seconds is not None:
            forecast = f"{readable(size)}, about {seconds:.0f} s"
            settings = replace(settings, description=f"{settings.description} ({forecast})")
        try:
            yield PreparedRun(operator, settings, batches, world)
        except AsymmetryError as error:
            if operator.dtype is torch.float64:
                raise
            exact = make_operator(
                params=operator.params,  # chosen.params may be an iterator, which is exhausted
                dtype=torch.float64,
                strategy="rebuild",
                micro_batch=operator.micro_batch,
            )
            if _is_symmetric(exact, settings):
                raise ResolutionError(
                    "the curvature is below the resolution of float32: the loss is "
                    f"{operator.loss:.1e}, and rounding makes its products asymmetric by "
                    f"{error.asymmetry:.1e} of the norm, whereas they are symmetric in float64. Use "
                    "dtype=torch.float64, or --dtype float64 on the command line"
                ) from None
            raise


def _own_folder(folder: Path, shard: str | None, world: World) -> Path:
    """Return the checkpoint folder of this rank: a subfolder per rank, or one that all ranks share.

    Raises:
        ValueError: the ranks share a run but find different ones.
    """
    world.barrier()  # the writing rank may still be writing the end of an earlier run
    if shard == "probes":
        return folder / f"rank-{world.rank}"
    if not world.agree(LanczosCheckpoint.fingerprint(folder)):
        raise ValueError(
            f"the ranks find different runs in {folder}; expected a folder on a file system that all "
            "ranks share, because rank 0 writes the checkpoint of all"
        )
    return folder


def _is_symmetric(operator: ModelOperator, settings: LanczosSettings) -> bool:
    """Return whether a short Lanczos run finds the products of an operator symmetric."""
    plain = replace(
        settings,
        steps=min(settings.steps, _STEPS_THAT_SHOW_ASYMMETRY),
        checkpoint=None,
        progress=False,
        tolerance=None,
    )
    try:
        with lanczos(operator, plain, identity={}):
            return True
    except AsymmetryError:
        return False


_STEPS_THAT_SHOW_ASYMMETRY = 17
"""Lanczos checks symmetry at steps that are powers of two; a wrong derivative shows at the first."""
