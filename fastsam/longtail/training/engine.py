"""Forward and backward passes of a network whose gradients the ranks share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.distributed import World
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.sharding import Parallel, shard, synchronize_gradients

_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"  # before torch 2.14


class Engine:
    """Computes passes of a network, and sums their gradients over all ranks.

    On several ranks, PyTorch's DistributedDataParallel or FSDP2 reduces the gradients while the backward pass
    is still running. Neither touches the buffers: each rank keeps its own running statistics within an epoch.

    Args:
        network: the network, with the same weights on all ranks. FSDP2 shards it in place, so construct the
            optimizer afterwards.
        world: the ranks of the run.
        parallel: ``ddp`` holds all weights on every rank; ``fsdp2`` holds a part of each weight, of its
            gradient and of the optimizer's state. It makes no difference for a single process.

    Attributes:
        is_sharded: whether this rank holds only a part of each weight.
    """

    def __init__(self, network: Classifier, world: World, parallel: Parallel = "ddp") -> None:
        self.network = network
        self.world = world
        self._replicas: DistributedDataParallel | None = None
        self.is_sharded = parallel == "fsdp2" and world.world_size > 1
        if self.is_sharded:
            shard(network)
        elif world.world_size > 1:
            options: dict[str, Any] = {"process_group": world.process_group, _SYNC_BUFFERS: False}
            self._replicas = DistributedDataParallel(_OutputsOf(network), **options)

    def outputs(self, inputs: Tensor) -> Outputs:
        """Compute :meth:`Classifier.outputs` of images ``[B, channels, H, W]``."""
        if self._replicas is None:
            return self.network.outputs(inputs)
        outputs: Outputs = self._replicas(inputs)
        return outputs

    @contextmanager
    def gradients(self, *, synchronize: bool) -> Iterator[None]:
        """Make one forward and backward pass inside the context.

        Args:
            synchronize: sum the gradients over all ranks, with those of earlier passes that were not
                synchronized.
        """
        if self.is_sharded:
            synchronize_gradients(self.network, enabled=synchronize)
            yield
        elif self._replicas is not None and not synchronize:
            with self._replicas.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor, *, local: bool) -> None:
        """Compute the gradient of the sum of ``loss`` over all ranks; if ``local``, of this rank's loss."""
        if self._replicas is not None and not local:
            loss = loss * self.world.world_size  # DistributedDataParallel averages
        loss.backward()  # type: ignore[no-untyped-call]


class _OutputsOf(nn.Module):
    """Calls :meth:`Classifier.outputs`, because DistributedDataParallel wraps only ``forward``."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Outputs:
        return self.network.outputs(inputs)
