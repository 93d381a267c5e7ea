"""Every epoch records its pace: images per second, waiting for data, gradients per step, memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import Batch, load_digits_lt
from fastsam.longtail.results import Epoch, Result
from fastsam.longtail.runtime import peak_memory
from fastsam.longtail.tracking.base import epoch_figures
from fastsam.longtail.training import batches, totals
from fastsam.longtail.training.step import Step
from fastsam.longtail.training.totals import EpochTotals

DIGITS = load_digits_lt()


def trainer(optimizer: str, **settings: Any) -> Trainer:
    config = recipe("digits-lt", "ce", optimizer, epochs=1, batch_size=256, **settings).config()
    return Trainer(config, data=DIGITS, progress=False)


class Clock:
    """A clock that only the test moves, in seconds."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes three seconds, a step two, and the evaluation seven, which do not count for the pace."""
    run = trainer("sam")
    clock = Clock()
    read, add, evaluate = batches.EpochBatches.read, EpochTotals.add, type(run.judge).predictions

    def slow(self: batches.EpochBatches, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        for batch in read(self, epoch, start=start):
            clock.now += 3.0
            yield batch

    def trained(self: EpochTotals, step: Step) -> None:
        add(self, step)
        clock.now += 2.0

    def late(*arguments: Any) -> Any:
        clock.now += 7.0
        return evaluate(*arguments)

    monkeypatch.setattr(totals, "time", clock)
    monkeypatch.setattr(batches.EpochBatches, "read", slow)
    monkeypatch.setattr(EpochTotals, "add", trained)
    monkeypatch.setattr(type(run.judge), "predictions", late)
    record = run._train_epoch(1)
    steps = run.steps_per_epoch
    assert record.images_per_second == len(DIGITS.train) / (5 * steps)
    assert record.waiting == 3 / 5
    assert record.seconds == 5 * steps + 7
    assert record.gradients_per_step == 2
    figures = epoch_figures(record)
    assert {"images_per_second", "waiting", "gradients_per_step", "memory"} <= figures.keys()


def test_gradients_per_step_of_sgd() -> None:
    (record,) = trainer("sgd").fit().history
    assert record.gradients_per_step == 1


def test_memory_is_the_peak_in_mib() -> None:
    block = torch.ones(1 << 28, dtype=torch.uint8)
    with_block = psutil.Process().memory_info().rss / 2**20
    del block
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    assert with_block - 1 <= peak < 10 * with_block


def test_records_of_older_versions_have_no_pace() -> None:
    result = trainer("sgd").fit()
    (record,) = result.history
    assert replace(record, waiting=0.5) == record, "the pace is no part of what a run computes"
    old = Epoch(1, 0.1, None, 2.0, 50.0, None, 0.1)
    again = Result.from_json(replace(result, history=[old]).to_json())
    assert again.history[0].images_per_second is None
    assert again.gradients is None
