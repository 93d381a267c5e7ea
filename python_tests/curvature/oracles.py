"""Independent oracles: explicit Hessians of small models in float64. Also losses that fail in some way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastsam.curvature import BatchLoss


def explicit_hessian(
    model: nn.Module, mean_loss: Callable[[nn.Module], Tensor], names: Sequence[str] | None = None
) -> Tensor:
    """Return the Hessian of ``mean_loss(model)`` over the named parameters, ``[n, n]``."""
    model = copy.deepcopy(model)  # functional_call may untie tied parameters permanently
    parameters = {
        name: value.detach()
        for name, value in model.named_parameters()
        if (value.requires_grad if names is None else name in names)
    }

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return mean_loss(self.model)

    whole = Whole()
    sizes = [value.numel() for value in parameters.values()]

    def loss_of(flat: Tensor) -> Tensor:
        pieces = flat.split(sizes)
        state = {
            f"model.{name}": piece.view(value.shape)
            for (name, value), piece in zip(parameters.items(), pieces, strict=True)
        }
        return functional_call(whole, state, ())

    flat = torch.cat([value.reshape(-1) for value in parameters.values()])
    return torch.func.hessian(loss_of)(flat).detach()


def mlp(sizes: Iterable[int] = (3, 5, 4), *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A tanh network without an activation at the end."""
    widths = list(sizes)
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Linear(before, after)] + ([nn.Tanh()] if index < len(widths) - 2 else [])
    return nn.Sequential(*layers).to(dtype)


def classification(
    samples: int, features: int, classes: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random inputs and targets."""
    return torch.randn(samples, features, dtype=dtype), torch.randint(classes, (samples,))


def full_spectrum(spectrum: Any) -> Tensor:
    """Return all nodes of the first probe."""
    return torch.as_tensor(spectrum.nodes[0])


class SineOnce(torch.autograd.Function):
    """A sine that can be differentiated once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


def interrupted_at(call: int, error: type[BaseException]) -> tuple[BatchLoss, list[int]]:
    """A summed cross-entropy whose evaluation number ``call`` raises, and a list of its evaluations."""
    calls: list[int] = []

    def summed(network: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        calls.append(1)
        if len(calls) == call:
            raise error
        return F.cross_entropy(network(data[0]), data[1], reduction="sum"), len(data[1])

    return BatchLoss(summed), calls
