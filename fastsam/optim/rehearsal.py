"""Training steps that are undone: the warm-up before a CUDA graph capture."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fastsam.optim.sam import SAM


@contextmanager
def rehearsal(
    model: nn.Module, optimizer: Optimizer, scaler: GradScaler | None = None
) -> Iterator[None]:
    """Undo all steps made inside the context.

    Restores weights, buffers, optimizer state, counters, the loss scale and random state, in place: a graph
    captured afterwards uses the memory that the steps allocated.
    """
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p for group in optimizer.param_groups for p in group["params"]]
    tensors = list({id(tensor): tensor for tensor in tensors}.values())
    before = [tensor.detach().clone() for tensor in tensors]
    skipped = optimizer.skipped_steps if isinstance(optimizer, SAM) else None
    attempted = optimizer.attempted_steps if isinstance(optimizer, SAM) else 0
    unstarted = optimizer.native_step.unstarted() if isinstance(optimizer, SAM) else set()
    state = {p: dict(entry) for p, entry in optimizer.state.items() if id(p) not in unstarted}
    values = deepcopy(list(state.values()))
    scale = None if scaler is None else scaler.state_dict()
    devices = sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            for entry, saved in zip(state.values(), values, strict=True):
                for key, value in saved.items():
                    if isinstance(value, Tensor):
                        entry[key].copy_(value)
            if isinstance(optimizer, SAM) and skipped is not None:
                optimizer.native_step.skipped_steps = skipped
                optimizer.policy.abandon()
                optimizer.policy.attempted_steps = attempted
                optimizer.state.clear()
                optimizer.state.update(state)
            else:
                _reset_new_state(optimizer, except_for=state)
        if scaler is not None and scale:
            scaler.load_state_dict(scale)


def _reset_new_state(optimizer: Optimizer, *, except_for: Container[Tensor]) -> None:
    """Set new state to zero, the initial value of torch's optimizers; a graph needs its memory to stay."""
    for parameter, entry in optimizer.state.items():
        if parameter not in except_for:
            for value in entry.values():
                if isinstance(value, Tensor):
                    value.zero_()
