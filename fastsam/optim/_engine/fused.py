"""Base optimizers whose update is fused with the restore, and their settings and state in the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class FusedRule:
    """A base optimizer with a fused kernel.

    Attributes:
        name: suffix of the native launch.
        hyper: returns a group's values for the columns of the block of hyperparameters.
        state_keys: returns the names of a group's state tensors, in the order of the kernel's slots.
        step_key: name of the state tensor that counts updates; None if the base optimizer has none.
        counts_steps: returns whether a group's update depends on the number of earlier updates.
        supports: returns whether the kernel supports all options of a group.
    """

    name: Literal["sgd", "adam"]
    hyper: Callable[[Mapping[str, Any]], dict[str, Any]]
    state_keys: Callable[[Mapping[str, Any]], tuple[str, ...]]
    step_key: str | None
    counts_steps: Callable[[Mapping[str, Any]], bool]
    supports: Callable[[Mapping[str, Any]], bool]


def _sgd_hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    return {name: group[name] for name in names}


def _adam_hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "maximize": group["maximize"],
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "decoupled": group["decoupled_weight_decay"],
    }


def _adam_state_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("exp_avg", "exp_avg_sq")
    return (*keys, "max_exp_avg_sq") if group["amsgrad"] else keys


_SGD = FusedRule(
    name="sgd",
    hyper=_sgd_hyper,
    state_keys=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    step_key=None,
    # The first update must be recognized: torch then has no buffer yet, and copies the gradient undampened.
    counts_steps=lambda group: group["momentum"] != 0,
    supports=lambda group: not group["differentiable"],
)
_ADAM = FusedRule(
    name="adam",
    hyper=_adam_hyper,
    state_keys=_adam_state_keys,
    step_key="step",
    counts_steps=lambda group: True,
    supports=lambda group: not group["differentiable"] and "decoupled_weight_decay" in group,
)
_RULES: dict[type[Optimizer], FusedRule] = {
    torch.optim.SGD: _SGD,
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}


def fused_rule(optimizer: Optimizer) -> FusedRule | None:
    """Return the fused rule of ``optimizer``, or None if its own ``step()`` must run.

    Subclasses and optimizers with step hooks run their own ``step()``, because they may do more than the
    kernel.
    """
    rule = _RULES.get(type(optimizer))
    if rule is None or not all(rule.supports(group) for group in optimizer.param_groups):
        return None
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    return rule


def new_state(rule: FusedRule, group: Mapping[str, Any], weight: Tensor) -> dict[str, Tensor]:
    """Return the initial state of a weight, as torch's optimizer would create it."""
    state: dict[str, Tensor] = {}
    if rule.step_key is not None:
        state[rule.step_key] = torch.zeros((), dtype=torch.float32, device=weight.device)
    for key in rule.state_keys(group):
        state[key] = torch.zeros_like(weight, memory_format=torch.preserve_format)
    return state


def needs_conversion(state: Tensor, weight: Tensor) -> bool:
    """Return whether a state tensor of the weight's shape needs another dtype, device or strides."""
    return state.shape == weight.shape and (
        state.dtype != weight.dtype
        or state.device != weight.device
        or state.stride() != weight.stride()
    )
