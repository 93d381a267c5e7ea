"""The decision of ``--precision auto``, made once per run."""

from __future__ import annotations

from typing import Literal

import torch

from fastsam.distributed import World
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.precision import Precision, chosen_precision
from fastsam.longtail.training.branch import Branch
from fastsam.longtail.training.resume import newest_outline
from fastsam.longtail.training.run_folder import RunFolder


def decided(
    config: TrainConfig,
    device: torch.device,
    world: World,
    *,
    folder: RunFolder | None = None,
    resume: bool | Literal["auto"] = False,
    branch: Branch | None = None,
) -> tuple[TrainConfig, str | None]:
    """Replace the precision ``auto`` by what it stands for.

    A resumed run keeps the precision that it began with, and a branch takes that of its parent, even on
    another device.

    Args:
        config: settings of the run.
        device: device of this rank. Rank 0 decides for all ranks.
        world: the ranks of the run.
        folder: folder of the run; None if nothing is written.
        resume: whether the run in ``folder`` is resumed.
        branch: checkpoint of the parent run; None for other runs.

    Returns:
        The settings, and the reason for the decision; None if ``config`` names a precision.
    """
    if config.precision != "auto":
        return config, None
    found: tuple[Precision, str] | None = None
    if world.rank == 0:  # another machine may not see the folder
        stored = newest_outline(folder) if resume and folder is not None else None
        if stored is not None:
            found = stored.config.precision, "the run began with it"
        elif branch is not None:
            found = branch.checkpoint.config.precision, f"{branch.name} has it"
        else:
            found = chosen_precision(device)
    decision = world.all_gather(found)[0]
    if decision is None:
        raise AssertionError("rank 0 decides")
    precision, reason = decision
    return config.replace(precision=precision), reason
