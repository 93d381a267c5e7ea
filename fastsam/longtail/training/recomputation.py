"""Activation checkpointing: the backward pass computes the activations of residual blocks again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastsam.longtail.errors import UsageError
from fastsam.longtail.models.blocks import BLOCKS, residual_blocks


def recomputed_blocks(network: nn.Module, name: str) -> list[nn.Module]:
    """Return the residual blocks of ``network``, whose activations are computed again.

    Args:
        network: the network.
        name: name of the network, for the message.

    Raises:
        UsageError: if there is none.
    """
    found = list(residual_blocks(network).values())
    if not found:
        raise UsageError(
            f"checkpoint_activations requires residual blocks, but {name} has no module whose class name "
            f"ends in {', '.join(BLOCKS[:-1])} or {BLOCKS[-1]}; omit --checkpoint-activations"
        )
    return found


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Store only the inputs of ``blocks`` in forward passes inside the context.

    The backward pass, which may run outside the context, computes each block again. Gradients, random numbers
    and running statistics are those of a pass without it.
    """
    for block in blocks:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=partial(_contexts, block),
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the method of the class is visible again


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _lent_buffers(block)


@contextmanager
def _lent_buffers(block: nn.Module) -> Iterator[None]:
    """Give the layers of ``block`` copies of their buffers, such as running statistics, inside the context.

    The second computation would otherwise update them again. Switching the update off is no solution: the
    layers would then store fewer tensors than in the first computation, which torch refuses.
    """
    layers = [module for module in block.modules() if module._buffers]
    own = [dict(layer._buffers) for layer in layers]
    for layer in layers:
        for name, value in layer._buffers.items():
            layer._buffers[name] = None if value is None else value.clone()
    try:
        yield
    finally:
        for layer, buffers in zip(layers, own, strict=True):
            layer._buffers.update(buffers)
