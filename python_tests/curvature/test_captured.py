"""Recorded products: replayed if the replay is correct, else run eagerly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastsam.curvature.products.captured import Captured


class Recorder:
    """Emulates CUDA graphs: a replay writes the result of the recorded function to the same tensor."""

    def __init__(self, *, error: Exception | None = None, distortion: float = 0.0) -> None:
        self.error, self.distortion = error, distortion
        self.runs = self.replays = 0

    def run(self, function: Callable):
        self.runs += 1
        return function()

    def record(self, function: Callable[[], Tensor]):
        if self.error is not None:
            raise self.error
        result = torch.full_like(function(), torch.nan)  # nothing is computed while recording

        def replay() -> None:
            self.replays += 1
            result.copy_(function() + self.distortion)

        return replay, result


def doubled() -> Callable[[Tensor], Tensor]:
    return lambda vectors: 2 * vectors


def test_the_first_call_records_and_later_ones_replay():
    recorder = Recorder()
    product = Captured(doubled, recorder)
    for round_ in range(1, 4):
        vectors = torch.randn(2, 5)
        assert torch.equal(product(vectors), 2 * vectors)
        assert recorder.replays == round_
    assert recorder.runs == 2  # the construction, and the first product
    assert product.refusal is None


def test_another_shape_runs_eagerly():
    recorder = Recorder()
    product = Captured(doubled, recorder)
    product(torch.randn(2, 5))
    vectors = torch.randn(3, 5)
    assert torch.equal(product(vectors), 2 * vectors)
    assert recorder.replays == 1
    vectors = torch.randn(2, 5)
    assert torch.equal(product(vectors), 2 * vectors)
    assert recorder.replays == 2


@pytest.mark.parametrize(
    ("recorder", "message"),
    [
        (Recorder(error=RuntimeError("operation not permitted\nwhen capturing")), "not permitted"),
        (Recorder(error=torch.OutOfMemoryError("out of memory")), "out of memory"),
        (Recorder(distortion=0.1), "differs from the eager one"),
        (Recorder(distortion=float("nan")), "differs from the eager one"),
    ],
)
def test_products_that_cannot_be_replayed_run_eagerly(recorder, message):
    product = Captured(doubled, recorder)
    for _ in range(3):
        vectors = torch.randn(2, 5)
        assert torch.equal(product(vectors), 2 * vectors)
    assert recorder.runs == 4
    assert message in product.refusal
    assert "\n" not in product.refusal
