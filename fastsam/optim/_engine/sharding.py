"""Sharded parameters: the local part, and the ranks that hold the other parts."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, is_available

if is_available():
    from torch.distributed import (
        all_gather_object,
        get_process_group_ranks,
        get_world_size,
        is_initialized,
    )

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    # Importing torch.distributed.tensor takes half as long as torch. Before somebody else has done so,
    # and in a build of torch without distributed support, no tensor can be a DTensor.
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(tensor, dtensor)


def refuse_flattened(parameter: Tensor) -> None:
    """Raise ValueError for a parameter of FSDP1, a part that looks whole: its norm would be one rank's."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} belongs to FullyShardedDataParallel (FSDP1), "
            "which hides how it is spread over the ranks: shard the model with FSDP2, "
            "torch.distributed.fsdp.fully_shard, and make the optimizer after it"
        )


def refuse_zero_redundancy() -> None:
    """Raise ValueError while ``ZeroRedundancyOptimizer`` constructs its optimizer of one rank's parameters.

    It marks neither the parameters nor their groups, so only the call stack tells.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise ValueError(
                "ZeroRedundancyOptimizer(params, SAM, ...) gives each rank's SAM a part of the parameters, "
                "and the norm of the ascent would be that of the part; put SAM around it: "
                "SAM(optimizer=ZeroRedundancyOptimizer(params, base_optimizer, ...), rho=...)"
            )
        frame = frame.f_back


def refuse_local_ascent(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError where a parameter is a DTensor: a rank cannot climb on its own gradient then."""
    if any(map(is_sharded, parameters)):
        raise ValueError(
            "process_group= is for ranks that climb on their own gradients, which needs whole "
            "parameters on every rank; with DTensor parameters (FSDP2, tensor parallel) leave "
            "it out: their norm is that of all ranks"
        )


def gathering_modules(parameters: Iterable[Tensor]) -> list[FSDPModule]:
    """Return the FSDP2 modules that gather ``parameters`` for their forward and backward passes."""
    # A DTensor does not know its module, so the modules are asked, through names that torch keeps to itself.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    wanted = set(map(id, parameters))
    found: list[FSDPModule] = []
    for module in list(_module_state_mapping):
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        # One group per module until several meshes became possible.
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group and any(id(p.sharded_param) in wanted for p in group.fsdp_params):
                found.append(module)
                break
    return found


def drop_gathered(modules: Iterable[FSDPModule]) -> None:
    """Free what ``modules`` have gathered, so that their next pass gathers the weights as they are now.

    FSDP2 keeps gathered weights after ``set_reshard_after_backward(False)``, and after a forward pass that no
    backward pass follows. Where it keeps none, this does nothing.
    """
    for module in modules:
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds; ``tensor`` itself unless it is a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def wrap_like(parameter: Tensor, part: Tensor) -> Tensor:
    """Return a DTensor with the mesh, placements and shape of ``parameter`` whose local part is ``part``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def local_gradient(parameter: Tensor) -> Tensor | None:
    """Return the part of the gradient that belongs to the local part of ``parameter``."""
    gradient = parameter.grad
    if gradient is None or not is_sharded(parameter):
        return gradient
    if not is_sharded(gradient):
        raise ValueError(
            "a DTensor parameter has a gradient that is not a DTensor; redistribute it like the parameter"
        )
    if gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(gradient)


def shard_groups(parameter: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the process groups over which the parts of ``parameter`` add up to the whole.

    One group for every dimension of the mesh along which the parameter is sharded; none for the dimensions
    along which it is replicated, where every rank already holds the same part.
    """
    if not is_sharded(parameter):
        return ()
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    groups = []
    for dimension, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            raise ValueError(
                "a parameter with a Partial placement cannot be optimized; redistribute it"
            )
        # Whatever is not a replica is a part: Shard, and the strided shards that FSDP2 makes of tensor
        # parallel ones, which do not call themselves shards.
        if not placement.is_replicate():
            groups.append(mesh.get_group(dimension))
    return tuple(groups)


def all_reduce_sum(value: Tensor, groups: tuple[ProcessGroup, ...]) -> None:
    """Sum ``value`` over the ranks of each group, in place."""
    for group in groups:
        all_reduce(value, ReduceOp.SUM, group)


def all_reduce_max(value: Tensor, groups: tuple[ProcessGroup, ...]) -> None:
    """Replace ``value`` by its maximum over the ranks of each group."""
    for group in groups:
        all_reduce(value, ReduceOp.MAX, group)


def all_reduce_mean(values: Iterable[Tensor], group: ProcessGroup) -> None:
    """Replace each of ``values`` by its mean over the ranks of a group, in one exchange for each dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for value in values:
        alike.setdefault((value.device, value.dtype), []).append(value)
    for members in alike.values():
        flat = torch.cat([member.reshape(-1) for member in members])
        all_reduce(flat, ReduceOp.SUM, group)
        flat.div_(get_world_size(group))
        parts = torch.split(flat, [member.numel() for member in members])
        for member, part in zip(members, parts, strict=True):
            member.copy_(part.view_as(member))


def gathered(
    value: Any, parameters: Iterable[Tensor], process_group: ProcessGroup | None
) -> list[tuple[int, Any]]:
    """Return the ``value`` of every rank that trains the same model, with the rank.

    Args:
        value: an object that can be pickled; every rank must call this.
        parameters: the parameters of the optimizer.
        process_group: the ranks. None: those over whose meshes parameters are distributed, or else all
            ranks of the default process group.

    Returns:
        ``(global rank, value)`` for each; nothing in a process that trains alone.
    """
    if not (is_available() and is_initialized()):
        return []
    groups = [process_group] if process_group is not None else _mesh_groups(parameters)
    found = []
    for group in groups or [None]:
        values: list[Any] = [None] * get_world_size(group)
        if len(values) > 1:
            all_gather_object(values, value, group)
            ranks = range(len(values)) if group is None else get_process_group_ranks(group)
            found += list(zip(ranks, values, strict=True))
    return found


def _mesh_groups(parameters: Iterable[Tensor]) -> list[ProcessGroup | None]:
    """Return the process groups of every mesh that has a DTensor of ``parameters``, in a fixed order."""
    meshes = dict.fromkeys(p.device_mesh for p in parameters if is_sharded(p))  # type: ignore[attr-defined]
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def increment_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that ``tensors`` were written natively, so that it detects a stale graph."""
    if tensors:
        torch.autograd.graph.increment_version(tensors)
