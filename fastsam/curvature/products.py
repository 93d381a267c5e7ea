"""Hessian-vector products of a summed loss: four strategies, one result, different costs.

========================  ===========================================  ====================
strategy                  cost of a product, in gradients              held between products
========================  ===========================================  ====================
``kept-graph``            about 2: backward through a kept backward    graph of every batch
``linearize``             about 2, with less overhead                  a trace of every batch
``forward-over-reverse``  about 3, and 2 for each further probe        nothing
``rebuild``               about 3.3                                    nothing
========================  ===========================================  ====================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastsam.curvature.data import map_tensors
from fastsam.curvature.losses import Objective


class PureLoss:
    """The summed loss as a pure function of chosen parameters; the model itself is never touched.

    Args:
        objective: model and loss.
        names: names of the chosen parameters, as in ``model.named_parameters()``.
        dtype: every floating-point parameter, buffer and input is converted to it.
    """

    def __init__(self, objective: Objective, names: Sequence[str], *, dtype: torch.dtype) -> None:
        self.objective = objective
        self.names = tuple(names)
        self.dtype = dtype
        state = {
            name: value.detach()
            for name, value in (*objective.named_parameters(), *objective.named_buffers())
        }
        chosen = [f"model.{name}" for name in names]
        self.values = tuple(self._convert(state.pop(name)) for name in chosen)
        # Copies, so that a module that writes into a buffer writes into ours.
        self._constants = {name: self._convert(value.clone()) for name, value in state.items()}
        self._chosen = tuple(chosen)
        self.device = self.values[0].device
        self.sizes = [value.numel() for value in self.values]
        self.dimension = sum(self.sizes)

    def __call__(self, parameters: Sequence[Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """(sum of losses, weight) of a batch on the run's device, at ``parameters``."""
        state = {**self._constants, **dict(zip(self._chosen, parameters, strict=True))}
        loss, weight = functional_call(self.objective, state, (batch,))
        return loss, weight

    def place(self, batch: Any) -> Any:
        """``batch`` on the run's device, floating-point tensors in the run's dtype."""
        return map_tensors(lambda tensor: self._convert(tensor.to(self.device)), batch)

    def leaves(self) -> tuple[Tensor, ...]:
        """Differentiable aliases of the parameters' values."""
        return tuple(value.detach().requires_grad_() for value in self.values)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector ``[..., n]`` as views of the parameters' shapes, leading dimensions kept."""
        pieces = torch.split(vector, self.sizes, dim=-1)
        lead = vector.shape[:-1]
        return tuple(
            piece.reshape(*lead, *value.shape)
            for piece, value in zip(pieces, self.values, strict=True)
        )

    def join(self, pieces: Iterable[Tensor], *, lead: int = 0) -> Tensor:
        """Inverse of :meth:`split`; ``lead`` is the number of leading dimensions."""
        return torch.cat(
            [piece.flatten(start_dim=lead) for piece in _flattenable(pieces, lead)], dim=-1
        )

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _flattenable(pieces: Iterable[Tensor], lead: int) -> Iterable[Tensor]:
    return (piece.unsqueeze(-1) if piece.ndim == lead else piece for piece in pieces)


def gradient(
    loss: PureLoss, batch: Any, leaves: Sequence[Tensor], *, differentiable: bool
) -> list[Tensor]:
    """Gradient of a batch's summed loss, zeros for unused parameters.

    Raises:
        ValueError: the loss does not depend on any of the parameters.
    """
    total, _ = loss(leaves, batch)
    if not total.requires_grad:
        raise ValueError(
            "the loss does not depend on the chosen parameters (detached outputs, or no_grad "
            "inside the model?)"
        )
    return list(
        torch.autograd.grad(
            total, leaves, create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
    )


class Product(Protocol):
    """Products of the un-normalised Hessian (of the sum of losses) with a block of vectors."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """``[probes, n]`` to ``[probes, n]``."""


class Rebuild:
    """Differentiate twice at every product; holds nothing between products."""

    def __init__(self, loss: PureLoss, batches: Iterable[Any]) -> None:
        self._loss = loss
        self._batches = batches

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products, batch by batch."""
        total = torch.zeros_like(vectors)
        for batch in self._batches:
            total += _Graph(self._loss, self._loss.place(batch)).product(vectors)
        return total


class KeptGraph:
    """Build every batch's gradient graph once and run backward through it at every product."""

    def __init__(self, loss: PureLoss, batches: Iterable[Any]) -> None:
        self._graphs = [_Graph(loss, loss.place(batch)) for batch in batches]

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products through the kept graphs."""
        total = self._graphs[0].product(vectors)
        for graph in self._graphs[1:]:
            total += graph.product(vectors)
        return total


class _Graph:
    """The differentiable gradient of one batch."""

    def __init__(self, loss: PureLoss, batch: Any) -> None:
        self._loss = loss
        self._leaves = loss.leaves()
        gradients = gradient(loss, batch, self._leaves, differentiable=True)
        # A gradient that does not depend on the parameters (a loss linear in them) has no graph.
        self._curved = [index for index, piece in enumerate(gradients) if piece.requires_grad]
        self._gradients = [gradients[index] for index in self._curved]

    def product(self, vectors: Tensor) -> Tensor:
        if not self._curved:
            return torch.zeros_like(vectors)
        return torch.stack([self._one(vector) for vector in vectors])

    def _one(self, vector: Tensor) -> Tensor:
        pieces = self._loss.split(vector)
        products = torch.autograd.grad(
            self._gradients,
            self._leaves,
            grad_outputs=[pieces[index] for index in self._curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self._loss.join(products)


class ForwardOverReverse:
    """Forward-mode derivative of the gradient, all probes in one vectorised pass; holds nothing."""

    def __init__(self, loss: PureLoss, batches: Iterable[Any]) -> None:
        _load_forward_mode()
        self._loss = loss
        self._batches = batches

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products, batch by batch."""
        total = torch.zeros_like(vectors)
        for batch in self._batches:
            total += self._product(vectors, self._loss.place(batch))
        return total

    def _product(self, vectors: Tensor, batch: Any) -> Tensor:
        gradients = _gradient_function(self._loss, batch)

        def along(tangent: tuple[Tensor, ...]) -> Any:
            return torch.func.jvp(gradients, (self._loss.values,), (tangent,))[1]

        products = torch.func.vmap(along)(self._loss.split(vectors))
        return self._loss.join(products, lead=1)


class Linearize:
    """Trace the linear map v -> H v of every batch once, then only replay it."""

    def __init__(self, loss: PureLoss, batches: Iterable[Any]) -> None:
        _load_forward_mode()
        self._loss = loss
        with warnings.catch_warnings():  # torch's tracer complains about its own constants
            warnings.filterwarnings("ignore", message=".*get_attr Node", category=UserWarning)
            self._maps = [
                torch.func.linearize(_gradient_function(loss, loss.place(batch)), loss.values)[1]
                for batch in batches
            ]

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products by the traced maps."""
        total = torch.zeros_like(vectors)
        pieces = self._loss.split(vectors)
        for linear_map in self._maps:
            if len(vectors) == 1:
                products = linear_map(tuple(piece[0] for piece in pieces))
                total += self._loss.join(products)[None]
            else:
                total += self._loss.join(torch.func.vmap(linear_map)(pieces), lead=1)
        return total


def _load_forward_mode() -> None:
    """Load torch's forward-mode rules without the deprecation warning from inside torch."""
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        torch.autograd.forward_ad.make_dual(  # type: ignore[no-untyped-call]
            torch.zeros(()), torch.zeros(())
        )


def _gradient_function(
    loss: PureLoss, batch: Any
) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    gradients: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = torch.func.grad(
        lambda parameters: loss(parameters, batch)[0]
    )
    return gradients


STRATEGIES: dict[str, Callable[[PureLoss, Iterable[Any]], Product]] = {
    "kept-graph": KeptGraph,
    "linearize": Linearize,
    "forward-over-reverse": ForwardOverReverse,
    "rebuild": Rebuild,
}
"""Every strategy by its name."""


def parameter_names(model: nn.Module, selection: Iterable[str] | None) -> list[str]:
    """Names of the parameters to differentiate by: all that require a gradient, or those selected.

    Args:
        model: any module.
        selection: names of parameters, or of modules (then all parameters in them); None for every
            parameter that requires a gradient.

    Raises:
        ValueError: an unknown name, or no parameter at all.
    """
    available = dict(model.named_parameters())
    if selection is None:
        names = [name for name, value in available.items() if value.requires_grad]
        if not names:
            raise ValueError(
                "the model has no parameter that requires a gradient; select some by name with "
                "params="
            )
    else:
        wanted = [selection] if isinstance(selection, str) else list(selection)
        names = []
        for entry in wanted:
            found = [name for name in available if name == entry or name.startswith(f"{entry}.")]
            if not found:
                known = ", ".join(list(available)[:20])
                raise ValueError(
                    f"params: no parameter or layer is called {entry!r}; parameters: {known}"
                )
            names += [name for name in found if name not in names]
        if not names:
            raise ValueError("params selects no parameter")
    for name in names:
        if not available[name].is_floating_point():
            raise ValueError(
                f"parameter {name!r} has dtype {available[name].dtype}, expected floating point"
            )
    devices = {available[name].device for name in names}
    if len(devices) > 1:
        raise ValueError(f"the parameters live on several devices: {sorted(map(str, devices))}")
    return names
