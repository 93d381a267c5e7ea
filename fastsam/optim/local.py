"""SAM over several ranks, each with its own ascent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.optim.passes import Need, run_passes
from fastsam.optim.sam import SAM


def local_sam_step(model: nn.Module, optimizer: SAM, compute_loss: Callable[[], Tensor]) -> Tensor:
    """Make one step in which every rank climbs on its own gradient: the m-sharpness of Foret et al. 2021.

    The first pass, forward included, runs inside ``model.no_sync()`` and communicates nothing. The second
    averages the gradients that the ranks found at their own perturbed weights. Where no ascent is due, the
    step is one synchronized pass and the base optimizer's update. A gradient that is not finite
    on one rank makes all ranks skip, so their weights stay equal bit for bit.

    Args:
        model: a ``DistributedDataParallel`` model.
        optimizer: made with ``process_group=``, the ranks of the model.
        compute_loss: forward pass over this rank's batch; called once for each pass.

    Returns:
        This rank's loss at the weights before the step, detached.

    Raises:
        TypeError: ``model`` is something else. Sharded models (FSDP2, tensor parallel) climb globally.
        ValueError: the optimizer has no ``process_group``; an ascent is due and the model is a
            ``static_graph=True`` one that has made no synchronized backward pass yet; or the ranks differ in
            their ascent policy. Nothing was changed in any case.

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
    has_learned = getattr(model, "_static_graph_delay_allreduce_enqueued", False)
    if optimizer.ascent_due and model.static_graph and not has_learned:
        raise ValueError(
            "DistributedDataParallel(static_graph=True) must synchronize its first backward pass, and "
            "a local ascent does not: construct the model with static_graph=False, or run one forward "
            "and backward pass with gradient synchronization before the first step"
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
