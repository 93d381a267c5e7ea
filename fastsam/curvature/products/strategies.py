"""Matrix-vector products of a model's curvature, by strategies that differ only in their costs.

========================  ===========================================  ====================
strategy                  cost of a product, in gradients              held between products
========================  ===========================================  ====================
``kept-graph``            about 2: backward through a kept gradient    graph of every batch
``kept-graph-batched``    the same, all probes in one vectorized pass  graph of every batch
``forward-over-reverse``  about 3 per probe in one vectorized pass     nothing
``rebuild``               1, plus about 2 per probe                    nothing
``mixed``                 kept-graph for some batches, else rebuild    graphs that fit
========================  ===========================================  ====================
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from fastsam.curvature.products.graphs import GraphBuilder
from fastsam.curvature.products.kinds import kind_named
from fastsam.curvature.products.kinds.hessian import HessianGraph
from fastsam.curvature.products.pure import PureLoss


class Product(Protocol):
    """Computes products of the curvature of a *sum* of losses with a block of vectors."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of ``vectors``, ``[probes, n]`` to ``[probes, n]``."""


class Rebuild:
    """Builds and frees the graph of every batch at every product; ``first`` is the first index."""

    def __init__(
        self,
        loss: PureLoss,
        batches: Iterable[Any],
        build: GraphBuilder = HessianGraph,
        *,
        first: int = 0,
    ) -> None:
        self._loss = loss
        self._batches = batches
        self._build = build
        self._first = first

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the products, summed over the batches."""
        total = torch.zeros_like(vectors)
        for number, batch in enumerate(self._batches, self._first):
            total += self._build(self._loss, self._loss.place(batch), number).product(vectors)
        return total


class KeptGraph:
    """Builds the graph of every batch once and reuses it at every product."""

    batched = False

    def __init__(
        self, loss: PureLoss, batches: Iterable[Any], build: GraphBuilder = HessianGraph
    ) -> None:
        self._graphs = [
            build(loss, loss.place(batch), number) for number, batch in enumerate(batches)
        ]

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the products, summed over the kept graphs."""
        total = torch.zeros_like(vectors)
        for graph in self._graphs:
            total += graph.product(vectors, batched=self.batched)
        return total


class Mixed:
    """Keeps the graphs of the first ``kept`` batches and rebuilds those of the others."""

    def __init__(
        self, loss: PureLoss, batches: Iterable[Any], build: GraphBuilder, *, kept: int
    ) -> None:
        batches = list(batches)
        self._kept = KeptGraph(loss, batches[:kept], build)
        self._rebuilt = Rebuild(loss, batches[kept:], build, first=kept)

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the products, summed over the kept and the rebuilt graphs."""
        return self._kept(vectors) + self._rebuilt(vectors)


class KeptGraphBatched(KeptGraph):
    """A :class:`KeptGraph` with all probes in one vectorized pass."""

    batched = True


class ForwardOverReverse:
    """Forward-mode derivative of the gradient, with all probes in one vectorized pass."""

    def __init__(self, loss: PureLoss, batches: Iterable[Any]) -> None:
        _load_forward_mode()
        self._loss = loss
        self._batches = batches

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the products, summed over the batches."""
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


@functools.cache
def _load_forward_mode() -> None:
    """Load torch's forward-mode rules, without the deprecation warning that torch causes itself."""
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        torch.autograd.forward_ad.make_dual(  # type: ignore[no-untyped-call]
            torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
        )


def _gradient_function(
    loss: PureLoss, batch: Any
) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    gradients: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = torch.func.grad(
        lambda parameters: loss(parameters, batch)[0]
    )
    return gradients


GRAPH_STRATEGIES: dict[str, type[KeptGraph] | type[Rebuild]] = {
    "kept-graph": KeptGraph,
    "kept-graph-batched": KeptGraphBatched,
    "rebuild": Rebuild,
}
"""Strategies that work with the graph of any curvature."""

Strategy = Literal[
    "auto", "kept-graph", "kept-graph-batched", "rebuild", "mixed", "forward-over-reverse"
]
STRATEGIES: tuple[str, ...] = tuple(name for name in get_args(Strategy) if name != "auto")
"""Names of all strategies; ``"auto"`` stands for one of them."""

HESSIAN_ONLY = ("kept-graph-batched", "forward-over-reverse")
"""Strategies that vectorize over the probes, which only the Hessian supports.

They use torch's rules for vmap or forward mode, which are wrong for some operations and which the kept
graph does not need. A plan therefore compares them with the kept graph before a run uses them.
"""


def gradients_per_block(strategy: str, probes: int) -> float:
    """Predict the cost of a block of products in gradients, from trials on a ResNet-32 (CPU)."""
    if strategy in ("rebuild", "mixed"):
        return 1.3 + 1.9 * probes
    return (3.0 if strategy == "forward-over-reverse" else 2.0) * probes


HOLDING = ("kept-graph", "kept-graph-batched")
"""Strategies that hold the graphs of all batches."""


def make_product(
    strategy: str, loss: PureLoss, batches: Iterable[Any], build: GraphBuilder, *, kept: int
) -> Product:
    """Return the product of a strategy by its name; only :class:`Mixed` uses ``kept``."""
    if strategy == "mixed":
        return Mixed(loss, batches, build, kept=kept)
    if strategy == "forward-over-reverse":
        return ForwardOverReverse(loss, batches)
    return GRAPH_STRATEGIES[strategy](loss, batches, build)


def check_strategy(strategy: str, *, kind: str, held: bool) -> None:
    """Raise ValueError for a strategy that is unknown or unsuited to the kind or the data."""
    if strategy == "auto":
        return
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy must be 'auto' or one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    if not kind_named(kind).is_hessian and strategy in HESSIAN_ONLY:
        raise ValueError(
            f"strategy {strategy!r} requires kind='hessian', got {kind!r}; use 'kept-graph' "
            "or 'rebuild'"
        )
    if not held and strategy in (*HOLDING, "mixed"):
        raise ValueError(
            f"strategy {strategy!r} requires all batches in memory, but data is read again at every "
            "product; use 'rebuild', or raise data_memory"
        )
