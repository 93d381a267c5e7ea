"""Assignment of an optimizer's parameters to buckets."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from fastsam.distributed import local_part
from fastsam.kernels import extension as native
from fastsam.optim._engine import sharding
from fastsam.optim._engine.backup import refuse_shared_memory
from fastsam.optim._engine.bucket import Member
from fastsam.optim._engine.outer import Groups
from fastsam.optim._engine.settings import normalized


def layout_of(groups: Groups) -> list[tuple[Any, ...]]:
    """Return what :func:`members_of` depends on, except names and storage, to detect changes."""
    return [
        (
            group["adaptive"],
            group["stochastic_rounding"],
            group["perturb"],
            *map(id, _taking_part(group["params"])),
        )
        for group in groups
    ]


def members_of(groups: Groups) -> tuple[list[list[Member]], list[Tensor]]:
    """Return the members of each bucket, and the frozen parameters that are in none.

    The parameters of a bucket have one device, one dtype, one set of ranks that share them, and one value of
    ``perturb``.

    Raises:
        ValueError: the kernels do not support the dtype or the sharding of a parameter, or parameters share
            memory.
    """
    members: dict[tuple[Any, ...], list[Member]] = {}
    left_out = []
    for index, group in enumerate(groups):
        taking_part = set(map(id, _taking_part(group["params"])))
        for parameter, adaptive in zip(group["params"], normalized(group), strict=True):
            if id(parameter) not in taking_part:
                left_out.append(parameter)
                continue
            sharding.refuse_flattened(
                parameter
            )  # again: FSDP1 may have sharded it after the constructor
            part = local_part(parameter)
            refuse_dtype(parameter)
            perturb = group["perturb"]
            key = (part.device, part.dtype, sharding.shard_groups(parameter), perturb)
            members.setdefault(key, []).append(
                Member(parameter, index, adaptive, group["stochastic_rounding"], perturb)
            )
    refuse_shared_memory([local_part(row.parameter) for rows in members.values() for row in rows])
    return list(members.values()), left_out


def _taking_part(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return all parameters except frozen ones without a gradient, which may have any dtype."""
    if all(map(_requires_grad, parameters)):
        return list(parameters)
    return [p for p in parameters if p.requires_grad or p.grad is not None]


_requires_grad = attrgetter("requires_grad")


def refuse_dtype(parameter: Tensor) -> None:
    """Raise ValueError if the kernels do not support the dtype of a parameter."""
    if parameter.dtype not in native.DTYPE_CODES:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has dtype {parameter.dtype}; expected float32, "
            "float64, bfloat16 or float16: convert it, or freeze it"
        )
