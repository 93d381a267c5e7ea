"""Forward and backward passes of a network whose gradients the ranks share."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.distributed import World
from fastsam.longtail.build import build_network
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.data import LongTailData
from fastsam.longtail.models.classifier import Classifier, Outputs
from fastsam.longtail.sharding import Parallel, shard, synchronize_gradients
from fastsam.longtail.training.compiled import CompileClock, check_compiler, compiled_outputs
from fastsam.longtail.training.loss_scale import LossScale
from fastsam.longtail.training.recomputation import recomputed, recomputed_blocks

_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"  # before torch 2.14


def network_to_train(
    config: TrainConfig,
    data: LongTailData,
    device: torch.device,
    *,
    module: nn.Module | None = None,
) -> Classifier:
    """Build the network of a run on a device, with its memory format and batch normalization.

    Args:
        config: settings of the run.
        data: data of the run.
        device: the device.
        module: your module for a network ``own:NAME``. It is copied.
    """
    images = data.test
    network = build_network(
        config, data.num_classes, images.channels, size=images.frame.size, module=module
    ).to(device)
    if config.sync_batch_norm:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    if config.channels_last:
        # Converting the filters is enough: their outputs get the same memory format.
        network = network.to(memory_format=torch.channels_last)
    return network


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
        loss_scale: scales losses and gradients in float16; None for other precisions.
        compiles: whether ``torch.compile`` compiles the passes.
        recomputes: blocks of ``network`` whose activations the backward pass computes again.

    Attributes:
        is_sharded: whether this rank holds only a part of each weight.
        clock: adds up the time of compilations inside its context; None if nothing is compiled.
    """

    def __init__(
        self,
        network: Classifier,
        world: World,
        *,
        parallel: Parallel = "ddp",
        loss_scale: LossScale | None = None,
        compiles: bool = False,
        recomputes: Sequence[nn.Module] = (),
    ) -> None:
        self.network = network
        self.world = world
        self.loss_scale = loss_scale
        self.clock = CompileClock() if compiles else None
        self._recomputes = recomputes
        self.is_sharded = parallel == "fsdp2" and world.world_size > 1
        if self.is_sharded:
            shard(network)  # replaces the method that is called below
        self._outputs = compiled_outputs(network) if compiles else network.outputs
        self._replicas: DistributedDataParallel | None = None
        if world.world_size > 1 and not self.is_sharded:
            # Two layouts of a filter with one channel are the same, and its gradient may have the other one.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            options: dict[str, Any] = {"process_group": world.process_group, _SYNC_BUFFERS: False}
            self._replicas = DistributedDataParallel(_OutputsOf(network, self._outputs), **options)

    @classmethod
    def of_run(
        cls, config: TrainConfig, network: Classifier, device: torch.device, world: World
    ) -> Engine:
        """Create the engine of a run.

        Raises:
            UsageError: if the run compiles and there is no compiler, or computes activations again and the
                network has no residual blocks.
        """
        if config.compile:
            check_compiler(device)
        recomputes = config.checkpoint_activations
        return cls(
            network,
            world,
            parallel=config.parallel,
            loss_scale=LossScale.of_run(config, device, world),
            compiles=config.compile,
            recomputes=recomputed_blocks(network, config.model) if recomputes else (),
        )

    def outputs(self, inputs: Tensor) -> Outputs:
        """Compute :meth:`Classifier.outputs` of images ``[B, channels, H, W]``."""
        with recomputed(self._recomputes):
            outputs: Outputs = (self._replicas or self._outputs)(inputs)
        return outputs

    def gradients(self, *, synchronize: bool) -> AbstractContextManager[None]:
        """Return a context for one forward and backward pass.

        Args:
            synchronize: sum the gradients over all ranks, with those of earlier passes that were not
                synchronized.
        """
        if self.is_sharded:
            synchronize_gradients(self.network, enabled=synchronize)
        if self._replicas is not None and not synchronize:
            return self._replicas.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor, *, local: bool) -> None:
        """Compute the gradient of the sum of ``loss`` over all ranks; if ``local``, of this rank's loss.

        In float16 the gradient is multiplied by the loss scale until :meth:`unscale`.
        """
        if self._replicas is not None and not local:
            loss = loss * self.world.world_size  # DistributedDataParallel averages
        if self.loss_scale is not None:
            loss = self.loss_scale.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def unscale(self, parameters: Sequence[Tensor], loss: Tensor) -> None:
        """Divide the gradients of a whole pass by the loss scale, before anything else uses them.

        Args:
            parameters: parameters whose ``.grad`` holds the gradient of this pass only.
            loss: the loss of the pass without the scale.
        """
        if self.loss_scale is not None:
            self.loss_scale.unscale(parameters, loss)


class _OutputsOf(nn.Module):
    """Computes the outputs in ``forward``, because DistributedDataParallel wraps nothing else.

    Args:
        network: the network, for its parameters.
        outputs: its :meth:`Classifier.outputs`, possibly compiled.
    """

    def __init__(self, network: Classifier, outputs: Callable[[Tensor], Outputs]) -> None:
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, inputs: Tensor) -> Outputs:
        return self.outputs(inputs)
