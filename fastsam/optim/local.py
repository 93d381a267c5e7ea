"""SAM over several ranks, each with its own ascent."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.optim.sam import SAM


def local_sam_step(model: nn.Module, optimizer: SAM, compute_loss: Callable[[], Tensor]) -> Tensor:
    """Make one step in which every rank climbs on its own gradient: the m-sharpness of Foret et al. 2021.

    The first pass, forward included, runs inside ``model.no_sync()`` and communicates nothing. The second
    averages the gradients that the ranks found at their own perturbed weights. A gradient that is not finite
    on one rank makes all ranks skip, so their weights stay equal bit for bit.

    Args:
        model: a ``DistributedDataParallel`` model.
        optimizer: made with ``process_group=``, the ranks of the model.
        compute_loss: forward pass over this rank's batch; called once for each pass.

    Returns:
        This rank's loss at the weights before the step, detached.

    Raises:
        TypeError: ``model`` is something else. Sharded models (FSDP2, tensor parallel) climb globally.
        ValueError: the optimizer has no ``process_group``, or the model is a ``static_graph=True`` one
            that has made no synchronized backward pass yet. Nothing was changed in either case.

    Example:
        >>> # See examples/ddp_local.py, to be run with `torchrun --nproc-per-node 2`.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"a local ascent needs a DistributedDataParallel model, got {type(model).__name__}"
        )
    if optimizer.process_group is None:
        raise ValueError(
            "a local ascent needs SAM(..., process_group=torch.distributed.group.WORLD), or a gradient that "
            "is not finite on one rank would make the ranks diverge"
        )
    # DDP notes here that its first backward pass, in which it learns a static graph, was synchronized.
    if model.static_graph and not getattr(model, "_static_graph_delay_allreduce_enqueued", False):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) must synchronize its first backward pass, and "
            "a local ascent does not: construct the model with static_graph=False, or run one forward "
            "and backward pass with gradient synchronization before the first step"
        )
    optimizer.zero_grad()
    with model.no_sync():
        loss = compute_loss()
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.first_step(zero_grad=True)
    try:
        compute_loss().backward()  # type: ignore[no-untyped-call]
    except BaseException:
        optimizer.restore()
        raise
    optimizer.second_step(zero_grad=True)
    return loss.detach()
