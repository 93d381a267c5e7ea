"""Choice of the strategy for products: what fits in memory, then what is faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastsam.curvature.captured import device_product
from fastsam.curvature.data import Batches
from fastsam.curvature.differentiable import refuse_undifferentiable
from fastsam.curvature.memory import plan_bytes, readable
from fastsam.curvature.modes import Arguments, DispatchMode, Keywords
from fastsam.curvature.products import (
    HESSIAN_ONLY,
    HOLDING,
    GraphBuilder,
    HessianGraph,
    make_product,
)
from fastsam.curvature.pure import PureLoss
from fastsam.curvature.structure import map_tensors, sample_count, tensors_of

AGREEMENT = 1e3
"""Largest difference of the products of two strategies, in units of eps times the operator's norm.

Rounding makes them differ by a few eps of the norm: at most 66 eps in 489 products of 150 random
networks, in float32 and float64. A wrong derivative differs by percents, which is 1e5 eps in float32.
"""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The strategy for the products of a run, with its predicted costs.

    Attributes:
        strategy: one of :data:`fastsam.curvature.products.STRATEGIES`.
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


JOINED_SAMPLES = 64
"""Maximum number of samples of joined batches, if the graphs of all batches are held."""

_SMALLER, _LARGER = 2, 4
"""Numbers of samples of the two graphs whose memory is measured."""

Cost = Callable[[int], int]
"""Maps a number of samples to the bytes of their graph."""


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
        cost = _graph_cost(loss, first, build)
        if sample_count(first) >= _LARGER:  # with fewer samples the cost is only a rough estimate
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
        micro_batch = _samples_that_fit(cost, room, largest, cuttable=_cuttable(loss, first))
    one_pass = micro_batch or largest
    kept = batches.samples if fits else 0
    if room is not None and batches.held and not fits:  # the pass being rebuilt needs room, too
        kept = _most_samples(cost, room - cost(one_pass), batches.samples)
    if strategy == "auto" and not fits and kept >= one_pass:
        candidates = ["mixed"]
    elif strategy == "auto":
        candidates = _candidates(loss, build, fits=fits, probes=probes)
    else:
        candidates = [strategy]
    if candidates == ["mixed"]:
        return Plan("mixed", micro_batch, moved + cost(kept) + cost(one_pass), kept_samples=kept)
    graph_bytes = moved + (total if fits and total is not None else cost(one_pass))
    piece = _head(first, one_pass)
    if len(candidates) == 1:
        _refuse_unfit(candidates[0], loss, piece, build)
        return Plan(candidates[0], micro_batch, graph_bytes)
    timed: dict[str, tuple[float, float]] = {}
    for name in candidates:
        known = measurements.times.get((*kind, probes, name))
        if known is None:
            samples = max(1, sample_count(piece))
            setup, product = _trial(name, loss, piece, build, probes)
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


def _trial(
    strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder, probes: int
) -> tuple[float, float]:
    """Measure the seconds of set-up and of a block of products; infinite for an unfit strategy."""
    if strategy not in HESSIAN_ONLY:
        return _time(strategy, loss, batch, build, probes)
    reason = _unfit(strategy, loss, batch, build)
    if reason is None:
        try:
            return _time(strategy, loss, batch, build, probes)
        except Exception as error:
            reason = _in_a_line(error)
    _LOG.debug("strategy %r is not used: %s", strategy, reason)
    return float("inf"), float("inf")


def _time(
    strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder, probes: int
) -> tuple[float, float]:
    vectors = torch.ones(probes, loss.dimension, dtype=loss.dtype, device=loss.device)
    began = _now(loss.device)
    product = device_product(strategy, loss, [batch], build, held=True)
    product(vectors)
    ready = _now(loss.device)
    product(vectors)
    return ready - began, _now(loss.device) - ready


def _unfit(strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder) -> str | None:
    """Return the reason why a strategy may not be used for this loss, or None.

    Two random products must agree with those of the kept graph. The operator's norm is estimated by
    a power iteration: products with these products, which favor the largest eigenvalues.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, loss.dimension, generator=generator, dtype=loss.dtype)
    vectors = vectors.to(loss.device)
    kept = make_product("kept-graph", loss, [batch], build, kept=0)
    expected = kept(vectors)
    scale = expected.norm(dim=1)
    norm = float(
        (kept(expected).norm(dim=1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)).max()
    )
    try:
        found = make_product(strategy, loss, [batch], build, kept=0)(vectors)
    except Exception as error:
        return _in_a_line(error)
    difference = float(((found - expected).norm(dim=1) / vectors.norm(dim=1)).max())
    if not difference <= AGREEMENT * torch.finfo(loss.dtype).eps * norm:
        return f"its products differ from those of the kept graph by {difference:.1e} at norm {norm:.1e}"
    return None


def _refuse_unfit(strategy: str, loss: PureLoss, batch: Any, build: GraphBuilder) -> None:
    """Raise ValueError for a requested strategy that fails or computes wrong products."""
    if strategy not in HESSIAN_ONLY:
        return
    reason = _unfit(strategy, loss, batch, build)
    if reason is not None:
        other = "kept-graph" if strategy in HOLDING else "rebuild"
        raise ValueError(
            f"strategy {strategy!r} does not work for this model and loss: {reason}. "
            f"Use strategy={other!r} or 'auto'"
        )


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _graph_cost(loss: PureLoss, batch: Any, build: GraphBuilder) -> Cost:
    """Estimate the bytes of a graph by its number of samples: a line through two small graphs."""
    samples = sample_count(batch)
    if not _cuttable(loss, batch) or samples < _LARGER:
        each = _graph_bytes(loss, batch, build)
        return lambda count: int(each * count / max(1, samples))
    small, large = (_graph_bytes(loss, _head(batch, n), build) for n in (_SMALLER, _LARGER))
    slope = max(0.0, (large - small) / (_LARGER - _SMALLER))
    return lambda count: int(max(0.0, small - _SMALLER * slope) + slope * count)


def _graph_bytes(loss: PureLoss, batch: Any, build: GraphBuilder) -> int:
    with _LiveStorage() as live:
        graph = build(loss, loss.place(batch), 0)
        size: int = live.count()
    total, _ = loss(loss.leaves(), loss.place(batch))
    refuse_undifferentiable([total], graph.roots)
    return size


def _samples_that_fit(
    cost: Callable[[int], int], room: int, largest: int, *, cuttable: bool
) -> int:
    count = largest
    while count > 1 and cost(count) > room:
        count = count // 2
    if cost(count) > room or not cuttable:
        needed = cost(count if cuttable else largest)
        raise ValueError(
            f"a pass over {count if cuttable else largest} samples needs about {readable(needed)}, "
            f"but {readable(room)} may be used besides the Lanczos basis: use smaller batches, fewer "
            "steps or probes, or basis='host'"
        )
    return count


def _most_samples(cost: Cost, room: int, samples: int) -> int:
    """Return the largest number of samples whose graphs fit in ``room``, by bisection."""
    fitting, too_many = 0, samples + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if cost(middle) <= room:
            fitting = middle
        else:
            too_many = middle
    return fitting


def _cuttable(loss: PureLoss, batch: Any) -> bool:
    return loss.model_loss.separable and sample_count(batch) > 1


def _head(batch: Any, count: int) -> Any:
    return (
        map_tensors(lambda tensor: tensor[:count], batch) if sample_count(batch) > count else batch
    )


class _LiveStorage(DispatchMode):
    """Counts the bytes of tensors that were created inside the context and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[StorageWeakRef, int]] = []

    def call(self, function: Callable[..., Any], arguments: Arguments, keywords: Keywords) -> Any:
        """Call ``function`` and record the storage of new tensors in its result."""
        result = function(*arguments, **keywords)
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((arguments, keywords))}
        for tensor in tensors_of(result):
            if tensor.untyped_storage()._cdata in given:  # a view of an argument
                continue
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._made.append((reference, storage.nbytes()))
        return result

    def count(self) -> int:
        """Return the number of bytes that are still alive."""
        alive: dict[int, int] = {}
        for reference, size in self._made:
            if not reference.expired():  # type: ignore[no-untyped-call]
                alive[reference.cdata] = size
        return sum(alive.values())


def pieces(batches: Batches, micro_batch: int | None) -> Batches:
    """Split the batches into passes of at most ``micro_batch`` samples."""
    if micro_batch is None:
        return batches

    def cut(batch: Any) -> list[Any]:
        def piece(start: int) -> Any:
            def rows(tensor: Tensor) -> Tensor:
                return tensor[start : start + micro_batch]

            return map_tensors(rows, batch)

        return [piece(start) for start in range(0, sample_count(batch), micro_batch)]

    return batches.mapped(cut)


def joined(batches: Batches, samples: int) -> Batches:
    """Join neighboring batches ``(inputs, targets)`` to passes of at most ``samples`` samples.

    The operator is a sum over samples, so this does not change it; larger passes have less overhead.
    """
    if not batches.held:
        return batches
    groups: list[list[Any]] = []
    for batch in batches:
        whole = sample_count(batch) + sum(sample_count(other) for other in (groups or [[]])[-1])
        if groups and whole <= samples and _joinable(groups[-1][0]) == _joinable(batch) != ():
            groups[-1].append(batch)
        else:
            groups.append([batch])

    def join(group: list[Any]) -> Any:
        return group[0] if len(group) == 1 else tuple(map(torch.cat, zip(*group, strict=True)))

    return replace(batches, source=[join(group) for group in groups])


def _joinable(batch: Any) -> tuple[Any, ...]:
    """Return the properties that must be equal to join two batches; () if a batch cannot be joined."""
    pair = isinstance(batch, (tuple, list)) and all(isinstance(item, Tensor) for item in batch)
    if not pair or any(item.ndim == 0 or len(item) != len(batch[0]) for item in batch):
        return ()
    return tuple((item.shape[1:], item.dtype, item.device) for item in batch)
