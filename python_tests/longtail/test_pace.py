"""Every epoch records its pace: images per second, waiting for data, gradients per step, memory."""

from __future__ import annotations

import time
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
from fastsam.longtail.training import batches

DIGITS = load_digits_lt()
PAUSE = 0.3


def trainer(optimizer: str, **settings: Any) -> Trainer:
    config = recipe("digits-lt", "ce", optimizer, epochs=1, batch_size=256, **settings).config()
    return Trainer(config, data=DIGITS, progress=False)


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data pause before each batch and the evaluation pauses, which counts for nothing."""
    run = trainer("sam")
    read = batches.EpochBatches.read
    steps = run.steps_per_epoch

    def slow(self: batches.EpochBatches, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        for batch in read(self, epoch, start=start):
            time.sleep(PAUSE)
            yield batch

    evaluate = type(run.judge).predictions

    def late(*arguments: Any) -> Any:
        time.sleep(10 * PAUSE)
        return evaluate(*arguments)

    monkeypatch.setattr(batches.EpochBatches, "read", slow)
    monkeypatch.setattr(type(run.judge), "predictions", late)
    began = time.perf_counter()
    record = run._train_epoch(1)
    whole = time.perf_counter() - began
    assert record.images_per_second is not None
    assert record.waiting is not None
    seconds = len(DIGITS.train) / record.images_per_second
    assert steps * PAUSE < seconds < whole - 10 * PAUSE
    assert record.seconds == pytest.approx(whole, abs=0.1)
    assert steps * PAUSE <= record.waiting * seconds < steps * PAUSE + 1.0
    assert record.waiting < 1
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
