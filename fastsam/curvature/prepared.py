"""Preparation of a run on a model: its operator and its options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsam.curvature.data import Batches, read_batches
from fastsam.curvature.isolation import undisturbed
from fastsam.curvature.lanczos.checkpoint import LanczosCheckpoint
from fastsam.curvature.lanczos.run import lanczos
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss
from fastsam.curvature.memory import readable
from fastsam.curvature.operators.base import AsymmetryError, ResolutionError
from fastsam.curvature.operators.model import ModelOperator
from fastsam.curvature.options import SpectrumOptions
from fastsam.curvature.sharding import shard_of_probes, sharded_world
from fastsam.distributed import World
from fastsam.threads import cpu_threads


@dataclass(frozen=True)
class PreparedRun:
    """A run on a model that is ready to start.

    Attributes:
        operator: the curvature, with a chosen strategy.
        options: options of this rank.
        batches: the data.
        world: the ranks of the run.
    """

    operator: ModelOperator
    options: SpectrumOptions
    batches: Batches
    world: World


@contextmanager
def prepared_run(
    model: nn.Module,
    loss_fn: LossFunction | OutputLoss | BatchLoss,
    data: Any,
    options: SpectrumOptions,
) -> Iterator[PreparedRun]:
    """Prepare a run, and isolate the context.

    If the checkpoint folder contains a run, its strategy, passes and number of threads are reused
    where the options allow it, because they determine the bits.

    Raises:
        TypeError, ValueError: as in :func:`fastsam.spectral_density`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    world = sharded_world(options.shard)
    if options.shard == "probes":
        options = replace(options, probe_indices=shard_of_probes(options.indices, world))
    options = replace(options, progress=options.progress and world.rank == 0)
    earlier = None
    if options.checkpoint is not None:
        folder = _own_folder(Path(options.checkpoint), options.shard, world)
        writes = options.shard == "probes" or world.rank == 0
        options = replace(options, checkpoint=folder, writes_checkpoint=writes)
        earlier = LanczosCheckpoint.identity_of(folder)
    threads = None if earlier is None else earlier.get("threads")
    with undisturbed(model, repeatable=options.checkpoint is not None), cpu_threads(threads):
        kept = None
        batches = read_batches(
            data,
            freeze=options.freeze,
            verify=options.verify_data,
            memory_limit=options.data_memory,
        )
        plan = _stored_plan(earlier, options)
        if plan is not None:
            options = replace(options, strategy=plan["strategy"], micro_batch=plan["micro_batch"])
            kept = plan["kept"]
        make_operator = partial(
            ModelOperator,
            model,
            loss_fn,
            batches,
            kind=options.kind,
            seed=options.seed,
            world=world if options.shard == "samples" else World(),
        )
        operator = make_operator(
            params=options.params,
            dtype=options.dtype,
            strategy=options.strategy,
            micro_batch=options.micro_batch,
            kept=kept,
        )
        operator.prepare(
            probes=len(options.indices),
            steps=min(options.steps, operator.shape[0]),
            memory_limit=options.memory_limit,
            reserved=options.basis_bytes(operator) if options.basis == "device" else 0,
            measurements=options.measurements,
        )
        if plan is not None and operator.micro_batch != options.micro_batch:
            raise ValueError(
                f"{options.checkpoint} contains a run with micro_batch={options.micro_batch}, but the "
                f"memory now requires micro_batch={operator.micro_batch}; free memory, raise "
                "memory_limit, or choose another folder"
            )
        size, seconds = operator.predicted_bytes, operator.predicted_seconds
        if size is not None and seconds is not None:
            forecast = f"{readable(size)}, about {seconds:.0f} s"
            options = replace(options, description=f"{options.description} ({forecast})")
        try:
            yield PreparedRun(operator, options, batches, world)
        except AsymmetryError as error:
            if operator.dtype is torch.float64:
                raise
            exact = make_operator(
                params=operator.params,  # options.params may be an iterator, which is exhausted
                dtype=torch.float64,
                strategy="rebuild",
                micro_batch=operator.micro_batch,
            )
            if _is_symmetric(exact, options):
                raise ResolutionError(
                    "the curvature is below the resolution of float32: the loss is "
                    f"{operator.loss:.1e}, and rounding makes its products asymmetric by "
                    f"{error.asymmetry:.1e} of the norm, whereas they are symmetric in float64. Use "
                    "dtype=torch.float64, or --dtype float64 on the command line"
                ) from None
            raise


def _stored_plan(
    identity: Mapping[str, Any] | None, options: SpectrumOptions
) -> Mapping[str, Any] | None:
    """Return the strategy and passes of a stored run; None if there are none that the options allow.

    The size of the passes depends on the free memory, also for a strategy that the user chose.
    """
    if identity is None or "strategy" not in identity:
        return None
    size, most = identity["micro_batch"], options.micro_batch
    fits = most is None or (size is not None and size <= most)
    return identity if fits and options.strategy in ("auto", identity["strategy"]) else None


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


def _is_symmetric(operator: ModelOperator, options: SpectrumOptions) -> bool:
    """Return whether a short Lanczos run finds the products of an operator symmetric."""
    plain = replace(
        options,
        steps=min(options.steps, _STEPS_THAT_SHOW_ASYMMETRY),
        checkpoint=None,
        stop=None,
        progress=False,
        tolerance=None,
    )
    try:
        lanczos(operator, plain, identity={})
    except AsymmetryError:
        return False
    return True


_STEPS_THAT_SHOW_ASYMMETRY = 17
"""Lanczos checks symmetry at steps that are powers of two; a wrong derivative shows at the first."""
