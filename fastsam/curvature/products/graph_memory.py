"""Memory of the graphs of batches, predicted from small ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef

from fastsam.curvature.memory import readable
from fastsam.curvature.products.differentiable import refuse_undifferentiable
from fastsam.curvature.products.graphs import GraphBuilder
from fastsam.curvature.products.modes import Arguments, DispatchMode, Keywords
from fastsam.curvature.products.passes import cuttable, head
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.structure import sample_count, tensors_of

Cost = Callable[[int], int]
"""Maps a number of samples to the bytes of their graph."""


SMALLER, LARGER = 2, 4
"""Numbers of samples of the two graphs whose memory is measured."""


def graph_cost(loss: PureLoss, batch: Any, build: GraphBuilder) -> Cost:
    """Estimate the bytes of a graph by its number of samples: a line through two small graphs."""
    samples = sample_count(batch)
    if not cuttable(loss, batch) or samples < LARGER:
        each = graph_bytes(loss, batch, build)
        return lambda count: int(each * count / max(1, samples))
    small, large = (graph_bytes(loss, head(batch, n), build) for n in (SMALLER, LARGER))
    slope = max(0.0, (large - small) / (LARGER - SMALLER))
    return lambda count: int(max(0.0, small - SMALLER * slope) + slope * count)


def graph_bytes(loss: PureLoss, batch: Any, build: GraphBuilder) -> int:
    """Return the bytes of the graph of a batch, which is built and dropped."""
    # The first evaluation of a loss copies its arguments, so it must not be the one that is measured.
    total, _ = loss(loss.leaves(), loss.place(batch))
    with LiveStorage() as live:
        graph = build(loss, loss.place(batch), 0)
        size: int = live.count()
    refuse_undifferentiable([total], graph.roots)
    return size


def samples_that_fit(cost: Callable[[int], int], room: int, largest: int, *, cuttable: bool) -> int:
    """Return the largest number of samples in a pass, found by halving.

    Raises:
        ValueError: not even the smallest pass fits in ``room``.
    """
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


def most_samples(cost: Cost, room: int, samples: int) -> int:
    """Return the largest number of samples whose graphs fit in ``room``, by bisection."""
    fitting, too_many = 0, samples + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if cost(middle) <= room:
            fitting = middle
        else:
            too_many = middle
    return fitting


class LiveStorage(DispatchMode):
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
