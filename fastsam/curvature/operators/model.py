"""The curvature of a model's loss over a data set, as an operator."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsam.curvature.checks import check_count
from fastsam.curvature.data import Batches
from fastsam.curvature.losses import BatchLoss, LossFunction, OutputLoss, make_model_loss, unwrapped
from fastsam.curvature.operators.coupling import refuse_coupled
from fastsam.curvature.products.captured import Captured, device_product
from fastsam.curvature.products.kinds import kind_named
from fastsam.curvature.products.passes import JOINED_SAMPLES, joined, pieces, splittable
from fastsam.curvature.products.planning import Measurements, make_plan
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.selection import parameter_names, shortest_selection
from fastsam.curvature.products.strategies import (
    HESSIAN_ONLY,
    HOLDING,
    Product,
    check_strategy,
    gradients_per_block,
)
from fastsam.curvature.randomness import USER_CODE
from fastsam.curvature.sharding import shard_of_samples
from fastsam.curvature.structure import sample_count, tensors_of
from fastsam.distributed import World
from fastsam.kernels.backends import sum_dtype, widened

_COMPARED = 4
"""Number of batches on which to check that the samples of a criterion are independent."""


class ModelOperator:
    """Curvature of (sum of losses) / (sum of loss weights) with respect to chosen parameters.

    The model must be in evaluation mode while the operator is used; see
    :func:`fastsam.curvature.isolation.undisturbed`.

    Args:
        model: any module with all parameters on one device.
        loss_fn: criterion or :class:`BatchLoss`.
        batches: the data.
        kind: name of a curvature matrix; see :class:`fastsam.curvature.SpectrumOptions`.
        params: names of parameters or layers; None for all that require a gradient.
        dtype: dtype of weights, data and vectors, float32 or float64; None for that of the
            parameters, at least float32.
        strategy: one of :data:`fastsam.curvature.products.strategies.STRATEGIES`, or ``"auto"``.
        micro_batch: maximum number of samples per pass; None to split batches only if memory
            requires it.
        kept: number of passes whose graphs ``"mixed"`` keeps; None for as many as fit.
        seed: seed of the targets drawn for ``"mc-fisher"``.
        world: ranks that share the samples. Default: one process.

    Attributes:
        loss: the mean loss.
        weight: sum of the weights (the number of samples if unweighted).
        gradient: gradient of the mean loss, ``[n]``.
        weight_norm: 2-norm of the chosen parameters.
        params: the chosen layers and parameters, by the fewest names that select them.
        strategy: the strategy in use; may be ``"auto"`` before :meth:`prepare`.
        micro_batch: samples per pass, or None.

    Raises:
        ValueError: a name is unknown, no parameter is chosen, the loss is random, not finite, or
            does not depend on the parameters, or the total weight is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | OutputLoss | BatchLoss,
        batches: Batches,
        *,
        kind: str = "hessian",
        params: Iterable[str] | None = None,
        dtype: torch.dtype | None = None,
        strategy: str = "auto",
        micro_batch: int | None = None,
        kept: int | None = None,
        seed: int = 0,
        world: World = World(),  # noqa: B008 (frozen)
    ) -> None:
        check_strategy(strategy, kind=kind, held=batches.held)
        if micro_batch is not None:
            check_count("micro_batch", micro_batch, unit="samples")
        model = unwrapped(model)
        self._build = kind_named(kind).builder(seed)
        model_loss = make_model_loss(model, loss_fn)
        names = parameter_names(model, params)
        self.params = shortest_selection(model, names)
        self._loss = PureLoss(model_loss, names, dtype=run_dtype(model, names, dtype))
        if micro_batch is not None and not model_loss.separable:
            raise ValueError(
                "micro_batch requires a criterion, because the batches of a BatchLoss cannot be "
                "split; pass smaller batches"
            )
        if micro_batch is not None:
            batches = splittable(batches, "micro_batch requires; omit it or pass smaller batches")
        if world.world_size > 1:
            batches = shard_of_samples(batches, world, separable=model_loss.separable)
        self._world = world
        self._alone = world.world_size == 1 and micro_batch is None
        self._batches = pieces(batches, micro_batch)
        self._survey()
        self.kind = kind_named(kind)
        self.strategy = strategy
        self.micro_batch = micro_batch
        self._kept = kept
        self._passes: int | None = None
        """Passes of all ranks over the data; None before :meth:`prepare`, or if data are read again."""
        self.predicted_bytes: int | None = None
        self.predicted_seconds: float | None = None
        self._product: Product | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return (self._loss.dimension, self._loss.dimension)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, data and vectors."""
        return self._loss.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._loss.device

    def prepare(
        self,
        *,
        probes: int,
        steps: int,
        memory_limit: int | None = None,
        reserved: int = 0,
        measurements: Measurements | None = None,
    ) -> None:
        """Choose the strategy and the passes; see :func:`fastsam.curvature.products.planning.make_plan`."""
        with _explained(self.strategy):
            plan = make_plan(
                self._loss,
                self._batches,
                self._build,
                strategy=self.strategy,
                probes=probes,
                steps=steps,
                memory_limit=memory_limit,
                reserved=reserved,
                measurements=Measurements() if measurements is None else measurements,
            )
        self.strategy = plan.strategy
        # The smallest of all ranks, because they share one identity.
        sizes = [size for size in self._world.all_gather(plan.micro_batch) if size is not None]
        if sizes:
            self.micro_batch = min(sizes)
            self._batches = pieces(self._batches, self.micro_batch)
        # The targets of mc-fisher are drawn per batch, so joining batches would change them.
        held = self.strategy in HOLDING and self.micro_batch is None
        if held and self._loss.model_loss.separable and not self.kind.is_random:
            self._batches = joined(self._batches, JOINED_SAMPLES)
        if self.strategy == "mixed" and self._kept is None:
            ends = np.cumsum([sample_count(batch) for batch in self._batches])
            self._kept = int(np.sum(ends <= plan.kept_samples))
        if self._batches.held:
            # Of rank 0, because all share one identity and the parts of a BatchLoss are uneven.
            self._passes = self._world.all_gather(len(list(self._batches)))[0]
        self.predicted_bytes = plan.graph_bytes + reserved
        each = plan.product_seconds
        if each is None:
            each = self._gradient_seconds * gradients_per_block(plan.strategy, probes)
        self.predicted_seconds = steps * each

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of ``vectors``, ``[probes, n]``."""
        with _explained(self.strategy):
            if self._product is None:
                if self.strategy == "auto":
                    self.prepare(probes=len(vectors), steps=1)
                self._product = device_product(
                    self.strategy,
                    self._loss,
                    self._batches,
                    self._build,
                    held=self._batches.held,
                    kept=self._kept or 0,
                )
            product = self._product(vectors)
            self._world.all_reduce([product])
            return product / self.weight

    def skip(self, products: int) -> None:
        """Read the data as often as so many products would, unless every read yields the same.

        The reads of unverified data may differ, and a resumed run continues with the next one.
        """
        if self._batches.held or self._batches.fingerprint is not None:
            return
        for _ in range(products):
            for _ in self._batches:
                pass

    @property
    def replayed(self) -> bool | str:
        """Whether products replay a CUDA graph; the reason if recording one failed."""
        if not isinstance(self._product, Captured):
            return False
        return self._product.refusal or True

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the bits of the products, for checkpoints."""
        return {
            "kind": self.kind.name,
            "strategy": self.strategy,
            "micro_batch": self.micro_batch,
            "kept": self._kept,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "parameters": self._loss.checksum(),
            "data": self._batches.fingerprint,
            "passes": self._passes,
        }

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector ``[n]`` into tensors of the parameters' shapes, by their names."""
        return self._loss.split_by_name(vector)

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Join tensors of the parameters' shapes to a vector ``[n]``."""
        return self._loss.join_by_name(pieces)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the chosen parameters, in the order of their coordinates."""
        return self._loss.names

    @property
    def sizes(self) -> list[int]:
        """Numbers of elements of the chosen parameters."""
        return self._loss.sizes

    def _survey(self) -> None:
        """Compute loss, weight and gradient over all data, and raise errors before the run."""
        total_loss = torch.zeros((), dtype=torch.float64, device="cpu")
        total_weight = torch.zeros((), dtype=torch.float64, device="cpu")
        total_gradient = torch.zeros(self._loss.dimension, dtype=self.dtype, device=self.device)
        self._gradient_seconds = 0.0
        first: list[Any] = []
        for index, batch in enumerate(self._batches):
            placed = self._loss.place(batch)
            leaves = self._loss.leaves()
            began = time.perf_counter()
            # With gradients enabled, because the loss may contain derivatives (force fields, penalties).
            total, weight = self._loss(leaves, placed)
            loss = total.detach()
            if not bool(torch.isfinite(loss)):
                raise ValueError(
                    f"the loss of batch {index} is {float(loss)}: {_nonfinite_cause(self._loss, placed)}"
                )
            pieces_of_gradient = self._loss.derivative(total, leaves, differentiable=False)
            del total
            total_gradient += self._loss.join(pieces_of_gradient)
            float(total_gradient[0])  # waits for the device
            self._gradient_seconds += time.perf_counter() - began
            if index == 0:
                self._loss.refuse_random(placed, float(loss))
            if index < _COMPARED:
                first.append(batch)
            total_loss += loss.cpu().double()
            total_weight += weight.cpu().double()
        refuse_coupled(self._loss, first, alone=len(first) == 1 and self._alone)
        totals = torch.stack([total_loss, total_weight]).to(
            self.device, sum_dtype(self.device, self.dtype)
        )
        self._world.all_reduce([totals])
        self._world.all_reduce([total_gradient])
        total_loss, total_weight = totals.cpu()
        self.weight = float(total_weight)
        if not self.weight > 0:
            raise ValueError(
                f"the losses have the total weight {self.weight}; it must be positive: check whether "
                "every target is ignored"
            )
        self.loss = float(total_loss) / self.weight
        self.gradient = total_gradient / self.weight
        squares = sum(float(widened(value).square().sum()) for value in self._loss.values)
        self.weight_norm = squares**0.5


@contextmanager
def _explained(strategy: str) -> Iterator[None]:
    """Convert autograd's errors about missing second derivatives to ValueErrors with a fix."""
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error) for word in ("derivative", "differentiate twice", "forward AD")):
            other = "; use strategy='kept-graph' or 'rebuild'" if strategy in HESSIAN_ONLY else ""
            raise ValueError(
                f"the loss cannot be differentiated twice (strategy {strategy!r}): {error}{other}"
            ) from error
        raise


def run_dtype(model: nn.Module, names: list[str], dtype: torch.dtype | None) -> torch.dtype:
    """Return ``dtype``, or by default the widest dtype of the parameters, at least float32."""
    if dtype is not None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        return dtype
    with USER_CODE:  # another run may have swapped its parameters into the model
        parameters = dict(model.named_parameters())
    widest = torch.float32
    for name in names:
        widest = torch.promote_types(widest, parameters[name].dtype)
    return widest


def _nonfinite_cause(loss: PureLoss, batch: Any) -> str:
    if any(
        bool(tensor.isnan().any()) for tensor in tensors_of(batch) if tensor.is_floating_point()
    ):
        return "the data contain NaN"
    if not all(bool(torch.isfinite(value).all()) for value in loss.values):
        return "the parameters are not finite"
    return "the data and the parameters are finite, so the model or the loss overflows"
