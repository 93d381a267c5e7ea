"""From the options of a call to an operator of a model that is ready for its run."""

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


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What an operator of a model is made of; :func:`fastsam.spectral_density` describes each."""

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
        """Part the options of a call into those of the operator and those of the Lanczos run."""
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
    """Prepare a run as :func:`fastsam.spectral_density` describes it; inside, nothing disturbs it.

    Strategy, passes and threads of a run that is found in the checkpoint are used again.

    Raises:
        TypeError, ValueError: as :func:`fastsam.spectral_density`.
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
                params=operator.params,  # chosen.params may be an iterator, which is used up
                dtype=torch.float64,
                strategy="rebuild",
                micro_batch=operator.micro_batch,
            )
            if _is_symmetric(exact, settings):
                raise ResolutionError(
                    f"the curvature is below the resolution of float32: the loss is "
                    f"{operator.loss:.1e}, and rounding makes its products asymmetric by "
                    f"{error.asymmetry:.1e} of the norm; in float64 they are symmetric. Use "
                    "dtype=torch.float64, or --dtype float64 on the command line"
                ) from None
            raise


def _own_folder(folder: Path, shard: str | None, world: World) -> Path:
    """Return the folder of this rank's run: one for each rank, or the one that all of them share.

    Raises:
        ValueError: the ranks share a run and find different ones.
    """
    world.barrier()  # the rank that writes may still be writing the end of the run before
    if shard == "probes":
        return folder / f"rank-{world.rank}"
    if not world.agree(LanczosCheckpoint.fingerprint(folder)):
        raise ValueError(
            f"the ranks find different runs in {folder}: it must be a folder that all of them can "
            "read, for all of them have one run, which the first one writes"
        )
    return folder


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
