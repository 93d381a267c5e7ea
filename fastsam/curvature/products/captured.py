"""Products on a GPU, replayed as one CUDA graph: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastsam.curvature.products.graphs import GraphBuilder
from fastsam.curvature.products.pure import PureLoss
from fastsam.curvature.products.strategies import Product, make_product
from fastsam.kernels.waits import waiting_is_an_error

Result = TypeVar("Result")
Replay = Callable[[], None]
"""Computes the recorded result again, into the same tensor."""


class Recorder(Protocol):
    """Records and runs products."""

    def run(self, function: Callable[[], Result]) -> Result:
        """Run a function without recording, such that later functions can be recorded."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record the launches of a function; return the replay and the result that it fills."""


class CudaRecorder:
    """Records CUDA graphs on a separate stream.

    Autograd runs a backward pass on the stream of its forward pass, and the default stream cannot
    be captured. The graphs of the loss must therefore be built on this stream, too.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, function: Callable[[], Result]) -> Result:
        """Run ``function`` on the recorder's stream, ordered with the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Record ``function`` as a CUDA graph.

        Raises:
            RuntimeError: the function does something that cannot be captured, or memory ran out.
        """
        with waiting_is_an_error():
            self.run(function)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = function()
        return graph.replay, result


@dataclass(frozen=True)
class _Recording:
    vectors: Tensor
    replay: Replay
    result: Tensor


class Captured:
    """A product that is recorded in its first call and replayed in later calls of the same shape.

    The first call runs the product eagerly and compares a replay with it. If the product cannot be
    recorded, for example because it waits for the device, or if the replay differs, all calls run
    eagerly. Each replay overwrites the result of the one before.

    Args:
        build: constructs the product.
        recorder: records it.

    Attributes:
        refusal: reason why the product is not replayed; None if it is, or before the first call.
    """

    def __init__(self, build: Callable[[], Product], recorder: Recorder) -> None:
        self._recorder = recorder
        self._product = recorder.run(build)
        self._recording: _Recording | None = None
        self.refusal: str | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of ``vectors``, ``[probes, n]`` to ``[probes, n]``."""
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
        # Kernels that add in no fixed order differ by rounding; a wrong replay differs by far more.
        if not difference <= torch.finfo(expected.dtype).eps ** 0.5 * float(expected.norm()):
            self.refusal = "the replayed product differs from the eager one"
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
    """Return the product of a strategy, recorded as a CUDA graph if possible.

    Args:
        strategy: one of :data:`fastsam.curvature.products.strategies.STRATEGIES`.
        loss: the loss.
        batches: the data.
        build: builds the graph of a batch.
        held: whether the batches stay in memory. On a GPU, the product is then recorded and the
            batches are held on the device.
        kept: number of batches whose graphs ``"mixed"`` keeps.
    """
    if loss.device.type != "cuda" or not held:
        return make_product(strategy, loss, batches, build, kept=kept)
    placed = [loss.place(batch) for batch in batches]
    return Captured(
        lambda: make_product(strategy, loss, placed, build, kept=kept), CudaRecorder(loss.device)
    )
