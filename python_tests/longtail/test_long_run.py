"""Ten thousand steps need no more memory, handles and threads than a thousand."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from torch import Tensor, nn

from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.models.base import MODELS, Model
from fastsam.longtail.training import Step

STEPS = 10_000
ALLOWED_MIB = 8.0
"""Growth of the resident memory in 9000 steps: less than a kilobyte per step."""


class Held(NamedTuple):
    mib: float
    handles: int
    threads: int


class Features(nn.Module):
    out_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.layers(inputs)
        return features


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_memory_handles_and_threads_are_flat(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Model(name="linear", build=lambda settings, channels: Features(), summary="linear")
    monkeypatch.setitem(MODELS._parts, "linear", made)
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    data = load_digits_lt()
    per_epoch = len(data.train) // 8
    options = {"model": "linear", "epochs": STEPS // per_epoch + 1, "batch_size": 8, "lr": 0.01}
    config = recipe("digits-lt", "ce", "sam", precision=precision, **options).config()
    process, held, taken = psutil.Process(), dict[int, Held](), 0

    def count(step: Step) -> None:
        nonlocal taken
        taken += 1
        if taken in (STEPS // 10, STEPS):
            gc.collect()
            memory = process.memory_info().rss / 2**20
            held[taken] = Held(memory, process.num_fds(), process.num_threads())

    run = Trainer(config, data=data, out=tmp_path / "run", on_step=count, progress=False)
    run.fit()
    assert taken >= STEPS
    before, after = held[STEPS // 10], held[STEPS]
    assert after.mib - before.mib < ALLOWED_MIB
    assert after.handles == before.handles
    assert after.threads == before.threads
