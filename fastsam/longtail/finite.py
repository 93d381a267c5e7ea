"""Check of a network for infinite and NaN values."""

from __future__ import annotations

import torch
from torch import nn

from fastsam.distributed import World, local_part


def not_finite(model: nn.Module, world: World = World()) -> str | None:  # noqa: B008 (frozen)
    """Return the name of the first parameter or running statistic with an infinite or NaN value, or None.

    It synchronizes with the device once.

    Args:
        model: the network.
        world: the ranks that hold the network or parts of it. All ranks return the same name.
    """
    statistics = ("running_mean", "running_var")
    values = {
        **dict(model.named_parameters()),
        **{name: v for name, v in model.named_buffers() if name.endswith(statistics)},
    }
    bad = torch.stack([~local_part(value).isfinite().all() for value in values.values()]).int()
    world.all_reduce([bad])
    return next((name for name, count in zip(values, bad.tolist(), strict=True) if count), None)
