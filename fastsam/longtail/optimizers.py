"""The optimizers by name, and how each of them takes a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from fastsam.longtail.config import TrainConfig
from fastsam.optim import SAM


def build_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The optimizer that ``config`` names for all parameters of ``model``, on torch's SGD."""
    named = list(model.named_parameters())
    sgd = SGD(
        named,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    if config.optimizer == "sgd":
        return sgd
    rho = (config.rho or (0.0,))[0]
    return SAM(optimizer=sgd, rho=rho, adaptive="weights" if config.optimizer == "asam" else False)


def set_schedule(optimizer: Optimizer, *, lr: float, rho: float | None) -> None:
    """Set learning rate and, where there is one, rho of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if rho is not None:
            group["rho"] = rho


@contextmanager
def frozen_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch normalisation as they are during a second pass.

    They would otherwise be averaged over the perturbed weights as well.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def take_step(optimizer: Optimizer, model: nn.Module, gradient: Callable[[], Tensor]) -> None:
    """One step of any of the optimizers.

    Args:
        optimizer: as from :func:`build_optimizer`.
        model: the network being trained.
        gradient: forward and backward of the batch, adding to ``.grad``; returns the loss.
    """
    optimizer.zero_grad()
    gradient()
    if isinstance(optimizer, SAM):

        def second_gradient() -> Tensor:
            with frozen_batch_statistics(model):
                return gradient()

        optimizer.step(second_gradient)
    else:
        optimizer.step()
