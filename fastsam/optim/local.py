"""m-sharpness over several ranks: each rank has its own ascent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.optim.passes import Need, run_passes
from fastsam.optim.sam import SAM


def local_sam_step(model: nn.Module, optimizer: SAM, compute_loss: Callable[[], Tensor]) -> Tensor:
    """Make one SAM step in which every rank perturbs the weights along its own gradient.

    This is the m-sharpness of Foret et al. 2021, with one part of the batch per rank. The first forward and
    backward pass runs inside ``model.no_sync()`` and communicates nothing. The second averages the gradients
    that the ranks compute at their own perturbed weights. If no ascent is due, the step is one synchronized
    pass and the base optimizer's update. If a gradient on one rank is not finite, all ranks skip the update,
    so their weights stay equal bit for bit.

    Args:
        model: a ``DistributedDataParallel`` model.
        optimizer: constructed with ``process_group=``, the ranks of the model.
        compute_loss: runs the forward pass over this rank's batch and returns the loss; called once per pass.

    Returns:
        This rank's loss at the weights before the step, detached.

    Raises:
        TypeError: ``optimizer`` is not a SAM optimizer, or ``model`` is not a ``DistributedDataParallel``.
            Sharded models (FSDP2, tensor parallel) can only ascend on the gradient of all ranks.
        ValueError: the optimizer has no ``process_group``; an ascent is due and the model, constructed with
            ``static_graph=True``, has not made a synchronized backward pass; or the ranks differ in their
            ascent policy. Nothing was changed.

    Example:
        >>> # See examples/ddp_local.py; run it with `torchrun --nproc-per-node 2`.
    """
    if not isinstance(optimizer, SAM):
        raise TypeError(f"local_sam_step requires a fastsam.SAM, got {type(optimizer).__name__}")
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"local_sam_step requires a DistributedDataParallel model, got {type(model).__name__}; with a "
            "sharded model use the optimizer's own steps"
        )
    if optimizer.process_group is None:
        raise ValueError(
            "local_sam_step requires process_group=, without which a gradient that is not finite on one rank "
            "would make the ranks diverge: construct SAM(..., process_group=torch.distributed.group.WORLD)"
        )
    # DDP learns a static graph in its first synchronized backward pass, and then sets this attribute.
    has_learned = getattr(model, "_static_graph_delay_allreduce_enqueued", False)
    if optimizer.ascent_due and model.static_graph and not has_learned:
        raise ValueError(
            "DistributedDataParallel(static_graph=True) must synchronize its first backward pass, and "
            "a local ascent does not synchronize: construct the model with static_graph=False, or run one "
            "forward and backward pass with gradient synchronization before the first step"
        )

    def answer(need: Need) -> Tensor:
        with model.no_sync() if need.local else nullcontext():
            loss = compute_loss()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.zero_grad()
    first, *_ = run_passes(optimizer.passes(), answer)
    optimizer.zero_grad()
    return first.detach()  # type: ignore[no-any-return]
