"""Sharded parameters: their local parts, and the ranks that hold the other parts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, is_available

from fastsam.distributed import all_reduce_flat, is_sharded, local_part

if is_available():
    from torch.distributed import (
        all_gather_object,
        get_process_group_ranks,
        get_world_size,
        is_initialized,
    )

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def refuse_flattened(parameter: Tensor) -> None:
    """Raise ValueError for a parameter of FSDP1: it looks whole, but its norm would be that of one rank."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} belongs to FullyShardedDataParallel (FSDP1), "
            "which does not expose how it is sharded: shard the model with FSDP2, "
            "torch.distributed.fsdp.fully_shard, and construct the optimizer afterwards"
        )


def refuse_zero_redundancy() -> None:
    """Raise ValueError if ``ZeroRedundancyOptimizer`` is the caller, with one rank's parameters.

    It marks neither the parameters nor their groups, so only the call stack identifies it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise ValueError(
                "ZeroRedundancyOptimizer(params, SAM, ...) gives SAM only one rank's part of the parameters, "
                "so the norm of the ascent would be wrong; wrap it in SAM instead: "
                "SAM(optimizer=ZeroRedundancyOptimizer(params, base_optimizer, ...), rho=...)"
            )
        frame = frame.f_back


def refuse_local_ascent(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError if a parameter is a DTensor, so that a rank cannot ascend on its own gradient."""
    if any(map(is_sharded, parameters)):
        raise ValueError(
            "process_group= is for ranks that ascend on their own gradients, which requires whole "
            "parameters on every rank; omit it with DTensor parameters (FSDP2, tensor parallel), whose "
            "norm is computed over all ranks"
        )


def gathering_modules(parameters: Iterable[Tensor]) -> list[FSDPModule]:
    """Return the FSDP2 modules that gather ``parameters`` for their forward and backward passes."""
    # A DTensor has no reference to its module, so search all modules, through private names of torch.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    wanted = set(map(id, parameters))
    found: list[FSDPModule] = []
    for module in list(_module_state_mapping):
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        # Older torch versions have one group per module, newer ones a list.
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group and any(id(p.sharded_param) in wanted for p in group.fsdp_params):
                found.append(module)
                break
    return found


def drop_gathered(modules: Iterable[FSDPModule]) -> None:
    """Free gathered weights of ``modules``, so that their next pass gathers the current weights.

    FSDP2 keeps gathered weights after ``set_reshard_after_backward(False)``, and after a forward pass without
    a backward pass. They would be stale after the kernels write the shards.
    """
    for module in modules:
        module.reshard()


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
    """Return this rank's part of the gradient, with the placements of ``parameter``; None without one."""
    gradient = parameter.grad
    if gradient is None or not is_sharded(parameter):
        return gradient
    if not is_sharded(gradient):
        raise ValueError(
            "a DTensor parameter has a gradient that is not a DTensor; expected a DTensor with the "
            "parameter's mesh: distribute the gradient first"
        )
    if gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local_part(gradient)


def shard_groups(parameter: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the process groups over which ``parameter`` is sharded.

    There is one group per mesh dimension along which the parameter is sharded, and none for dimensions along
    which it is replicated: summing over replicas would count a part more than once.
    """
    if not is_sharded(parameter):
        return ()
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    groups = []
    for dimension, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            raise ValueError(
                "a parameter has a Partial placement; expected Shard or Replicate: redistribute the parameter"
            )
        # Test for replicas, not for shards: is_shard() is False for the strided shards that FSDP2 makes of
        # tensor-parallel parameters.
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


def largest(value: int, parameters: Iterable[Tensor]) -> int:
    """Return the maximum of ``value`` over all ranks that hold parts of ``parameters``."""
    reduced: dict[ProcessGroup, torch.device] = {}
    for parameter in parameters:
        for group in shard_groups(parameter):
            reduced.setdefault(group, local_part(parameter).device)
    for group, device in reduced.items():
        flag = torch.tensor(value, device=device)
        all_reduce_max(flag, (group,))
        value = int(flag)
    return value


def several(group: ProcessGroup | None) -> ProcessGroup | None:
    """Return ``group`` if it has several ranks, and None if this rank is alone in it."""
    return group if group is not None and get_world_size(group) > 1 else None


def all_reduce_mean(values: Sequence[Tensor], group: ProcessGroup) -> None:
    """Replace each of ``values`` by its mean over the ranks, with one all-reduce per device and dtype."""
    all_reduce_flat(values, group)
    for value in values:
        value.div_(get_world_size(group))


def gathered(
    value: Any, parameters: Iterable[Tensor], process_group: ProcessGroup | None
) -> list[tuple[int, Any]]:
    """Gather ``value`` from all ranks that train the same model. Every rank must call this.

    Args:
        value: an object that can be pickled.
        parameters: the parameters of the optimizer.
        process_group: the ranks. None: those of the meshes of DTensor parameters, or else all ranks of the
            default process group.

    Returns:
        ``(global rank, value)`` pairs; an empty list in a process that trains alone.
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
    """Return the process groups of all meshes of ``parameters``, in the same order on every rank."""
    meshes = dict.fromkeys(p.device_mesh for p in parameters if is_sharded(p))  # type: ignore[attr-defined]
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def increment_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that kernels wrote ``tensors``, so that it detects stale graphs."""
    if tensors:
        torch.autograd.graph.increment_version(tensors)
