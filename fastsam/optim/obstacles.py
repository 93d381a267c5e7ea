"""Reasons why a step cannot be captured as a CUDA graph, known before it is tried."""

from __future__ import annotations

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastsam.distributed import is_sharded
from fastsam.optim._engine.fused import fused_rule
from fastsam.optim.sam import SAM


def obstacle(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None = None
) -> str | None:
    """Return the reason why a step cannot be captured as a CUDA graph, or None if it can."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len({p.device for p in parameters}) > 1:
        return "the parameters are on several devices"
    reason = (
        _obstacle_of_sam(optimizer)
        if isinstance(optimizer, SAM)
        else _obstacle_of_base(optimizer, scaler)
    )
    if reason is not None:
        return reason
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "the optimizer's step hooks would run once, during the capture, and never again; remove them"
    if isinstance(model, DistributedDataParallel):
        return "communication between ranks is not captured; train with the plain calls"
    if any(is_sharded(p) for p in parameters):
        return "DTensor parameters need communication between ranks; train with the plain calls"
    if any(p.grad is not None for p in parameters):
        return "parameters already have gradients: call optimizer.zero_grad() first"
    return None


def _obstacle_of_sam(optimizer: SAM) -> str | None:
    if fused_rule(optimizer.base_optimizer) is None:
        return (
            f"{type(optimizer.base_optimizer).__name__} has no fused update here and reads a flag on the "
            "host in every step; use SGD, Adam or AdamW without step hooks"
        )
    if optimizer.backend == "torch":
        return (
            "its steps run on PyTorch operations, which are not captured; unset FASTSAM_KERNELS, or install "
            "the CUDA kernels (fastsam.require_native() explains how)"
        )
    if optimizer.peers is not None:
        return "communication between ranks is not captured; train with the plain calls"
    return None


def _obstacle_of_base(optimizer: Optimizer, scaler: GradScaler | None) -> str | None:
    """Return the reason why a step of torch's own optimizer cannot be captured, or None."""
    name = type(optimizer).__name__
    if type(optimizer) not in (SGD, Adam, AdamW):
        return f"{name} is neither SAM nor torch's SGD, Adam or AdamW"
    for group in optimizer.param_groups:
        option = "fused" if isinstance(optimizer, SGD) else "capturable"
        if not group[option]:
            return f"{name} synchronizes with the host in its step: construct it with {option}=True"
        if scaler is not None and scaler.is_enabled() and not group["fused"]:
            return (
                f"a GradScaler reads a flag on the host before each step of {name}, unless it is fused: "
                "construct it with fused=True, capturable=True"
            )
        lr = group["lr"]
        if not (isinstance(lr, Tensor) and all(lr.device == p.device for p in group["params"])):
            return (
                f"a graph would freeze {name}'s learning rate: pass it as a tensor on the parameters' "
                'device, lr=torch.tensor(0.1, device="cuda"); schedulers then change it in place'
            )
        if group.get("dampening") and any(_is_fresh(optimizer, p) for p in group["params"]):
            return (
                "the first step of SGD with dampening differs from all later ones: make one step with the "
                "plain calls first"
            )
    return None


def _is_fresh(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Return whether ``parameter`` has not been updated yet."""
    return not any(
        isinstance(value, Tensor) for value in optimizer.state.get(parameter, {}).values()
    )
