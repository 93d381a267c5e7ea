"""Forward passes that do not update the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Keep ``running_mean``, ``running_var`` and ``num_batches_tracked`` unchanged inside the context.

    A SAM step makes two forward passes over one batch, the second with perturbed weights. Without this
    context both update the running statistics. Layers in training mode still normalize with the statistics of
    the batch, so losses and gradients do not change; layers in evaluation mode are not affected. Contexts may
    be nested, and an exception ends them like any other exit.

    Args:
        model: the model; all its BatchNorm and SyncBatchNorm layers are affected.

    Example:
        >>> import torch
        >>> from fastsam.optim import frozen_batch_norm_statistics
        >>> layer = torch.nn.BatchNorm1d(3)
        >>> with frozen_batch_norm_statistics(layer):
        ...     _ = layer(torch.randn(8, 3))
        >>> int(layer.num_batches_tracked)
        0
    """
    with frozen_statistics(batch_norm_layers(model)):
        yield


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm and SyncBatchNorm layers of a model that have running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


@contextmanager
def frozen_statistics(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Keep the running statistics of ``layers`` unchanged; see :func:`frozen_batch_norm_statistics`.

    A caller that makes many passes looks up the layers once, with :func:`batch_norm_layers`.

    Args:
        layers: the layers. Those whose statistics are frozen already stay so after the context.
    """
    # In training mode, a layer with track_running_stats=False passes no running statistics to the kernel. In
    # evaluation mode it still uses them, so the switch is safe even if the mode changes inside the context.
    changed = [layer for layer in layers if layer.track_running_stats]
    # A plain attribute: nn.Module's __setattr__ would first look for a parameter of this name, which takes
    # longer than all else here.
    for layer in changed:
        layer.__dict__["track_running_stats"] = False
    try:
        yield
    finally:
        for layer in changed:
            layer.__dict__["track_running_stats"] = True
