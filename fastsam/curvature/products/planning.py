"""Choice of the strategy for products: what fits in memory, then what is faster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastsam.curvature.data import Batches
from fastsam.curvature.memory import plan_bytes, readable
from fastsam.curvature.products.graph_memory import (
    LARGER,
    Cost,
    graph_cost,
    most_samples,
    samples_that_fit,
)
from fastsam.curvature.products.graphs import GraphBuilder
from fastsam.curvature.products.kinds.hessian import HessianGraph
from fastsam.curvature.products.passes import cuttable, head
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.strategies import HOLDING
from fastsam.curvature.products.trials import refuse_unfit, trial
from fastsam.curvature.structure import sample_count, tensors_of


@dataclass(frozen=True)
class Plan:
    """The strategy for the products of a run, with its predicted costs.

    Attributes:
        strategy: one of :data:`fastsam.curvature.products.strategies.STRATEGIES`.
        micro_batch: samples per pass, or None to keep the batches unchanged.
        graph_bytes: predicted bytes of the graphs that the strategy holds, or of its largest
            temporary graph if it holds none.
        product_seconds: predicted seconds of a block of products; None if nothing was measured.
        kept_samples: number of samples whose graphs ``"mixed"`` may keep.
    """

    strategy: str
    micro_batch: int | None
    graph_bytes: int
    product_seconds: float | None = None
    kept_samples: int = 0


@dataclass(frozen=True)
class Measurements:
    """Measurements of one model and loss, which several runs can share.

    Runs over classes share one object: memory and the best strategy depend on the shape of a sample
    and on the parameters, and time is proportional to the number of samples.

    Attributes:
        costs: memory of graphs, keyed by parameters and shape of a sample.
        times: seconds per sample of set-up and of a block of products, keyed also by the number of
            probes and the strategy.
    """

    costs: dict[Any, Cost] = field(default_factory=dict)
    times: dict[Any, tuple[float, float]] = field(default_factory=dict)


def make_plan(
    loss: PureLoss,
    batches: Batches,
    build: GraphBuilder,
    *,
    strategy: str,
    probes: int,
    steps: int,
    memory_limit: int | None,
    reserved: int,
    measurements: Measurements,
) -> Plan:
    """Choose a strategy and, under a memory limit, the size of the passes.

    Memory is measured on temporary graphs of a few samples. Time is measured on the first batch, and
    only if there is a choice whose measurement can pay off.

    Args:
        loss: the loss.
        batches: the data.
        build: builds the graph of a batch.
        strategy: a name, or ``"auto"``.
        probes: number of vectors in a block.
        steps: number of blocks of products in the run.
        memory_limit: bytes that the run may use on its device; None for 80 % of free memory.
        reserved: bytes of that for the Lanczos basis.
        measurements: earlier measurements, to which new ones are added.

    Raises:
        ValueError: the requested strategy does not fit in memory, or fails or is wrong for this
            loss; or even a pass over one sample does not fit.
    """
    first = next(iter(batches), None)
    if first is None:  # this rank has no samples
        return Plan("rebuild" if strategy == "auto" else strategy, None, 0)
    limit = plan_bytes(loss.device, memory_limit)
    kind = (loss.names, loss.dtype, getattr(build, "__name__", None), _sample_shape(first))
    cost = measurements.costs.get(kind)
    if cost is None:
        cost = graph_cost(loss, first, build)
        if sample_count(first) >= LARGER:  # with fewer samples the cost is only a rough estimate
            measurements.costs[kind] = cost
    moved = _data_bytes(loss, batches)
    room = None if limit is None else max(0, limit - reserved - moved)
    largest = (
        max((sample_count(batch) for batch in batches), default=1)
        if batches.held
        else sample_count(first)
    )
    total = cost(batches.samples) if batches.held else None
    fits = total is not None and (room is None or total <= room)
    if strategy in HOLDING and room is not None and total is not None and not fits:
        raise ValueError(
            f"strategy {strategy!r} needs about {readable(total)} for graphs, but {readable(room)} "
            "may be used besides the Lanczos basis; use 'auto' or 'rebuild', or raise memory_limit"
        )
    micro_batch = None
    if room is not None and cost(largest) > room:
        micro_batch = samples_that_fit(cost, room, largest, cuttable=cuttable(loss, first))
    one_pass = micro_batch or largest
    kept = batches.samples if fits else 0
    if room is not None and batches.held and not fits:  # the pass being rebuilt needs room, too
        kept = most_samples(cost, room - cost(one_pass), batches.samples)
    if strategy == "auto" and not fits and kept >= one_pass:
        candidates = ["mixed"]
    elif strategy == "auto":
        candidates = _candidates(loss, build, fits=fits, probes=probes)
    else:
        candidates = [strategy]
    if candidates == ["mixed"]:
        return Plan("mixed", micro_batch, moved + cost(kept) + cost(one_pass), kept_samples=kept)
    graph_bytes = moved + (total if fits and total is not None else cost(one_pass))
    piece = head(first, one_pass)
    if len(candidates) == 1:
        refuse_unfit(candidates[0], loss, piece, build)
        return Plan(candidates[0], micro_batch, graph_bytes)
    timed: dict[str, tuple[float, float]] = {}
    for name in candidates:
        known = measurements.times.get((*kind, probes, name))
        if known is None:
            samples = max(1, sample_count(piece))
            setup, product = trial(name, loss, piece, build, probes)
            known = measurements.times[(*kind, probes, name)] = setup / samples, product / samples
        timed[name] = known
    best = min(timed, key=lambda name: timed[name][0] + steps * timed[name][1])
    return Plan(best, micro_batch, graph_bytes, batches.samples * timed[best][1])


def _data_bytes(loss: PureLoss, batches: Batches) -> int:
    """Return the bytes of the data on a GPU, where recorded products need them; else 0."""
    if loss.device.type != "cuda" or not batches.held:
        return 0
    return sum(tensor.nbytes for batch in batches for tensor in tensors_of(batch))


def _sample_shape(batch: Any) -> tuple[Any, ...]:
    return tuple((tensor.shape[1:], tensor.dtype) for tensor in tensors_of(batch))


def _candidates(loss: PureLoss, build: GraphBuilder, *, fits: bool, probes: int) -> list[str]:
    """Return the strategies to measure, beginning with the one that uses plain graphs.

    On the CPU vectorizing over the probes gains nothing (a ResNet-32 takes 2.5 gradients per probe
    instead of 2.1), so there is no choice. On a GPU larger kernels may be faster.
    """
    plain, vectorized = (
        ("kept-graph", "kept-graph-batched") if fits else ("rebuild", "forward-over-reverse")
    )
    if probes > 1 and loss.device.type == "cuda" and build is HessianGraph:
        return [plain, vectorized]
    return [plain]
