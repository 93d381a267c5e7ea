"""Which parameters of an optimizer's groups share a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from fastsam.kernels import extension as native
from fastsam.optim._engine import sharding
from fastsam.optim._engine.bucket import Member
from fastsam.optim._engine.outer import Groups
from fastsam.optim._engine.settings import normalized


def layout_of(groups: Groups) -> list[tuple[Any, ...]]:
    """Return all that :func:`members_of` depends on besides names and storage, for comparison."""
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
    """Return the members of each bucket, and the parameters that are left out.

    A bucket has one device and dtype, one set of ranks that share its parameters, and either perturbed
    parameters or others.

    Raises:
        ValueError: a parameter is one that the kernels do not know.
    """
    members: dict[tuple[Any, ...], list[Member]] = {}
    left_out = []
    for index, group in enumerate(groups):
        taking_part = set(map(id, _taking_part(group["params"])))
        for parameter, adaptive in zip(group["params"], normalized(group), strict=True):
            if id(parameter) not in taking_part:
                left_out.append(parameter)
                continue
            sharding.refuse_flattened(parameter)  # the model may have been sharded since
            part = sharding.local(parameter)
            if part.dtype not in native.DTYPE_CODES:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} is {part.dtype}; SAM knows "
                    "float32, float64, bfloat16 and float16"
                )
            perturb = group["perturb"]
            key = (part.device, part.dtype, sharding.shard_groups(parameter), perturb)
            members.setdefault(key, []).append(
                Member(parameter, index, adaptive, group["stochastic_rounding"], perturb)
            )
    return list(members.values()), left_out


def _taking_part(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return all but frozen parameters without a gradient, which cost no memory and may be of any dtype."""
    if all(map(_requires_grad, parameters)):
        return list(parameters)
    return [p for p in parameters if p.requires_grad or p.grad is not None]


_requires_grad = attrgetter("requires_grad")
