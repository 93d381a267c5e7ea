"""From the options of a call to an operator of a model that is ready for its run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

    from fastsam.curvature.options import RunOptions


@dataclass(frozen=True)
class PreparedRun:
    """A run on a model, about to begin.

    Attributes:
        operator: the curvature, with its strategy settled.
        settings: of the Lanczos run, this rank's own where ranks share it.
        batches: the data as they were read.
        world: the processes of the run.
    """

    operator: ModelOperator
    settings: LanczosSettings
    batches: Batches
    world: World


@contextmanager
def prepared_run(
    model: nn.Module,
    loss_fn: LossFunction | BatchLoss,
    data: Any,
    *,
    curvature: str = "hessian",
    params: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    strategy: str = "auto",
    micro_batch: int | None = None,
    freeze: int | None = None,
    verify_data: bool = True,
    data_memory: int = DATA_MEMORY,
    shard: str | None = None,
    measurements: Measurements | None = None,
    **options: Unpack[RunOptions],
) -> Iterator[PreparedRun]:
    """Prepare a run as :func:`fastsam.spectral_density` describes it; inside, nothing disturbs it.

    Strategy, passes and threads of a run that is found in the checkpoint are used again.

    Raises:
        TypeError, ValueError: as :func:`fastsam.spectral_density`.
    """
    settings = LanczosSettings(**options, verify_symmetry=verify_data)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    world = sharded_world(shard)
    if shard == "probes":
        settings = replace(settings, probe_indices=shard_of_probes(settings.indices, world))
    settings = replace(settings, progress=settings.progress and world.rank == 0)
    earlier = None
    if settings.checkpoint is not None:
        folder = Path(settings.checkpoint)
        world.barrier()  # the rank that writes may still be writing the end of the run before
        if shard == "probes":
            folder /= f"rank-{world.rank}"
        elif not world.agree(LanczosCheckpoint.fingerprint(folder)):
            raise ValueError(
                f"the ranks find different runs in {folder}: it must be a folder that all of them "
                "can read, for all of them have one run, which the first one writes"
            )
        writes = shard == "probes" or world.rank == 0
        settings = replace(settings, checkpoint=folder, writes_checkpoint=writes)
        earlier = LanczosCheckpoint.identity_of(folder)
    threads = None if earlier is None else earlier.get("threads")
    with undisturbed(model, repeatable=settings.checkpoint is not None), cpu_threads(threads):
        kept = None
        batches = read_batches(data, freeze=freeze, verify=verify_data, memory_limit=data_memory)
        if earlier is not None and strategy == "auto" and "strategy" in earlier:
            strategy, micro_batch = earlier["strategy"], earlier["micro_batch"]
            kept = earlier.get("kept")
        operator = ModelOperator(
            model,
            loss_fn,
            batches,
            curvature=curvature,
            params=params,
            dtype=dtype,
            strategy=strategy,
            micro_batch=micro_batch,
            kept=kept,
            seed=settings.seed,
            world=world if shard == "samples" else World(),
        )
        operator.prepare(
            probes=len(settings.indices),
            steps=min(settings.steps, operator.shape[0]),
            memory_limit=settings.memory_limit,
            reserved=settings.basis_bytes(operator) if settings.basis == "device" else 0,
            measurements=measurements,
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
            exact = ModelOperator(
                model,
                loss_fn,
                batches,
                curvature=curvature,
                params=params,
                dtype=torch.float64,
                strategy="rebuild",
                micro_batch=operator.micro_batch,
                seed=settings.seed,
                world=world if shard == "samples" else World(),
            )
            if _is_symmetric(exact, settings):
                raise ResolutionError(
                    f"the curvature is below the resolution of float32: the loss is "
                    f"{operator.loss:.1e}, and rounding makes its products asymmetric by "
                    f"{error.asymmetry:.1e} of the norm; in float64 they are symmetric. Use "
                    "dtype=torch.float64, or --dtype float64 on the command line"
                ) from None
            raise


def _is_symmetric(operator: ModelOperator, settings: LanczosSettings) -> bool:
    """Whether the products of an operator in float64 are symmetric, as Lanczos sees it."""
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
"""Lanczos compares at powers of two; a wrong derivative shows at the first of them."""
