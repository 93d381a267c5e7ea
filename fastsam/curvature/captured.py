"""Products on a GPU replayed as one CUDA graph: one launch in place of thousands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastsam.curvature.products import GraphBuilder, Product, make_product
from fastsam.curvature.pure import PureLoss

Result = TypeVar("Result")
Replay = Callable[[], None]
"""Computes a recorded result anew, into the same tensor."""


class Recorder(Protocol):
    """What records and runs a product."""

    def run(self, function: Callable[[], Result]) -> Result:
        """Run a function as it is, where it can be recorded later."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record what a function launches; its result is filled by every replay."""


class CudaRecorder:
    """CUDA graphs, on a stream of their own.

    Autograd runs a backward on the stream of its forward, and the default stream cannot be
    recorded: so whatever is to be recorded later must be built here too.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` on the recorder's stream, between what came before and comes after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record ``function`` as a CUDA graph.

        Raises:
            RuntimeError: it does something that cannot be recorded, or memory ran out.
        """
        # Whatever waits for the device says so in this run: a recording that fails half-way leaves
        # torch's allocator in disorder.
        with _waiting_is_an_error():
            self.run(function)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = function()
        return graph.replay, result


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # Torch's first word on this mode, which may be an error by the user's own filters.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class _Recording:
    vectors: Tensor
    replay: Replay
    result: Tensor


class Captured:
    """A product that is recorded at its first call and replayed at every later one of that shape.

    The first call runs the product as it is and compares a replay with it. A product that cannot
    be recorded (it waits for the device or reads the host, say) or whose replay differs runs as it
    is from then on. The result of a replay is overwritten by the next.

    Args:
        build: makes the product.
        recorder: how it is recorded.

    Attributes:
        refusal: why the product is not replayed; None where it is, or before the first call.
    """

    def __init__(self, build: Callable[[], Product], recorder: Recorder) -> None:
        self._recorder = recorder
        self._product = recorder.run(build)
        self._recording: _Recording | None = None
        self.refusal: str | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        """``[probes, n]`` to ``[probes, n]``."""
        recorded = self._recording
        if recorded is not None and recorded.vectors.shape == vectors.shape:
            recorded.vectors.copy_(vectors)
            recorded.replay()
            return recorded.result
        result = self._recorder.run(lambda: self._product(vectors))
        if recorded is None and self.refusal is None:
            self._record(vectors, result)
        return result

    def _record(self, vectors: Tensor, expected: Tensor) -> None:
        given = vectors.clone()
        try:
            replay, result = self._recorder.record(lambda: self._product(given))
            replay()
            difference = float((result - expected).norm())
        except RuntimeError as error:
            self.refusal = str(error).partition("\n")[0]
            return
        # Kernels that add up in any order differ by rounding; a wrong replay differs by far more.
        if not difference <= torch.finfo(expected.dtype).eps ** 0.5 * float(expected.norm()):
            self.refusal = "a replay gave another product"
            return
        self._recording = _Recording(given, replay, result)


def device_product(
    strategy: str,
    loss: PureLoss,
    batches: Iterable[Any],
    build: GraphBuilder,
    *,
    held: bool,
    kept: int = 0,
) -> Product:
    """The product of a strategy as it is best run on the loss's device.

    Args:
        strategy: one of :data:`fastsam.curvature.products.STRATEGIES`.
        loss: the loss.
        batches: the data.
        build: builds the graph of a batch.
        held: whether the batches stay in memory; on a GPU the product is then recorded, and the
            batches are held there.
        kept: number of batches whose graphs ``"mixed"`` keeps.
    """
    if loss.device.type != "cuda" or not held:
        return make_product(strategy, loss, batches, build, kept=kept)
    placed = [loss.place(batch) for batch in batches]
    return Captured(
        lambda: make_product(strategy, loss, placed, build, kept=kept), CudaRecorder(loss.device)
    )
