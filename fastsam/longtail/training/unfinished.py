"""The state of an epoch between two of its steps, in addition to that of the run after an epoch.

Ranks see different images, so within an epoch each has its own totals and running statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.distributed import World
from fastsam.longtail.errors import CheckpointError
from fastsam.longtail.training.totals import EpochTotals


def unfinished_state(
    totals: EpochTotals, networks: Sequence[nn.Module], world: World, *, batches: int, parts: int
) -> dict[str, Any]:
    """Return the state of an epoch on all ranks. They must call this together.

    Args:
        totals: totals of this rank.
        networks: networks with buffers of their own: the trained one and its average.
        world: the ranks of the run.
        batches: number of batches of the epoch so far.
        parts: :attr:`Stepper.parts`.
    """
    own = {
        "totals": totals.state_dict(),
        "buffers": [
            {name: value.detach().cpu() for name, value in network.named_buffers()}
            for network in networks
        ]
        if world.world_size > 1
        else [],
    }
    return {"batches": batches, "parts": parts, "ranks": world.all_gather(own)}


@torch.no_grad()
def continue_unfinished(
    state: Mapping[str, Any], totals: EpochTotals, networks: Sequence[nn.Module], world: World
) -> None:
    """Load the state of an epoch.

    Another number of ranks than before adds up the totals, and averages running statistics as at the end of
    an epoch.

    Args:
        state: the result of :func:`unfinished_state`.
        totals: totals of this rank, which has made no step.
        networks: the networks, with the state of the checkpoint.
        world: the ranks of the run.

    Raises:
        CheckpointError: if the state does not fit the networks.
    """
    ranks = state["ranks"]
    same = len(ranks) == world.world_size
    try:
        if same:
            totals.load_state_dict(ranks[world.rank]["totals"])
        else:
            every = [rank["totals"] for rank in ranks]
            totals.load_state_dict(_sum(every) if world.rank == 0 else _nothing(every[0]))
        for place, network in enumerate(networks):
            buffers = [rank["buffers"][place] for rank in ranks if rank["buffers"]]
            for name, value in network.named_buffers() if buffers else ():
                alike = [one[name] for one in buffers]
                value.copy_(alike[world.rank] if same else _mean(alike))
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the state of an unfinished epoch does not fit this run: {error}; remove the folder resume of "
            "the run to continue after its last whole epoch"
        ) from error


def _sum(totals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counted = [sum(values) for values in zip(*(one["counted"] for one in totals), strict=True)]
    return {**totals[0], "loss": sum(one["loss"] for one in totals), "counted": counted}


def _nothing(totals: Mapping[str, Any]) -> dict[str, Any]:
    return {**totals, "loss": 0.0, "counted": [0] * len(totals["counted"])}


def _mean(values: Sequence[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack(list(values)).mean(dim=0)
