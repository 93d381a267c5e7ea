"""Runs that are stopped between any two steps continue to the bits of the uninterrupted run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastsam.cli import main
from fastsam.longtail import Checkpoint, Result, Trainer
from fastsam.longtail.archive import write_archive
from fastsam.longtail.errors import CheckpointError
from fastsam.longtail.trained import TrainedRun
from fastsam.longtail.training import RunFolder, Step
from fastsam.stopping import Stopped, StopRequest, stop_signals
from python_tests.longtail.test_float16 import linear  # noqa: F401 (a fixture)
from python_tests.longtail.test_trainer import FEW, short

DATA = replace(FEW, validation=FEW.test)
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sam": ("ldam-drw", "sam", {"ema": 0.9, "ascent_start": "1"}),
    "looksam": ("ib-drs", "looksam", {"rho": (0.2,)}),
    "lpf-sgd": ("vs-rs", "lpf-sgd", {"batch_size": 24, "lpf_parts": 4}),
    "sgd": ("eql", "sgd", {"select": "best-validation", "accumulate": 2}),
    "paco": ("paco", "sgd", {}),
    "entropy-sgd": ("ce", "entropy-sgd", {}),
    "sample": ("ce-drw", "sam", {"ascent_share": 0.5, "ascent_sample": "weighted"}),
    "mixup": ("ce-drw", "sam", {"mixer": "mixup", "ascent_share": 0.5}),
    "cmo": ("ldam", "sgd", {"mixer": "cmo", "cmo_skip_first": 0, "cmo_skip_last": 1}),
    "float16": ("ce", "sam", {"precision": "float16", "model": "linear"}),
}


def train(config: Any, out: Path | None, **options: Any) -> tuple[Result, Trainer]:
    trainer = Trainer(config, data=DATA, out=out, progress=False, **options)
    return trainer.fit(), trainer


def stop_after(steps: int) -> tuple[StopRequest, Callable[[Step], None]]:
    """Return a request, and a function that makes it after so many calls."""
    request, left = StopRequest(), iter(range(steps - 1, -1, -1))

    def on_step(_: Step) -> None:
        if next(left, 0) == 0:
            request.signal = "SIGTERM"

    return request, on_step


def compared(result: Result) -> dict[str, Any]:
    return {
        "history": [
            {
                k: v
                for k, v in vars(epoch).items()
                if epoch.__dataclass_fields__[k].compare and k != "seconds"
            }
            for epoch in result.history
        ],
        "test": result.test,
        "validation": result.validation,
        "rule": result.rule,
    }


@pytest.mark.filterwarnings("ignore:classes are balanced")
@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize("name", RUNS)
def test_stopped_between_steps_it_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    method, optimizer, options = RUNS[name]
    config = short(method, optimizer, **{"epochs": 3, "batch_size": 9, **options})
    expected, whole = train(config, None)
    rng = np.random.default_rng(25)
    messages = []
    for _ in range(100):
        request, on_step = stop_after(int(rng.integers(1, 8)))
        try:
            result, resumed = train(config, tmp_path, resume="auto", stop=request, on_step=on_step)
        except Stopped as stop:
            messages.append(str(stop))
            continue
        break
    assert len(messages) >= 2
    assert all("stopped by SIGTERM" in text and "--resume auto" in text for text in messages)
    assert compared(result) == compared(expected)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert not (tmp_path / "resume").exists()
    assert Checkpoint.load(tmp_path).epoch == 3


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short("ce", "sam", epochs=2, batch_size=9, checkpoint_steps=1)
    expected, _ = train(config, None)
    request, on_step = stop_after(5)
    with pytest.raises(Stopped):
        train(config, tmp_path, stop=request, on_step=on_step)
    folder = RunFolder(tmp_path)
    newest, before = folder.points()
    assert [newest.name, before.name] == ["epoch-0-step-5.pt", "epoch-0-step-4.pt"]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result, trainer = train(config, tmp_path, resume=True)
    assert compared(result) == compared(expected)
    assert trainer.stepper.batches == 2 * trainer.steps_per_epoch - 4
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "continuing from epoch-0-step-4.pt" in message


def test_all_checkpoints_damaged_is_an_error_also_with_auto(tmp_path: Path) -> None:
    config = short("ce", "sgd", epochs=1, batch_size=9)
    request, on_step = stop_after(2)
    with pytest.raises(Stopped):
        train(config, tmp_path, stop=request, on_step=on_step)
    (point,) = RunFolder(tmp_path).points()
    point.write_bytes(point.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        train(config, tmp_path, resume="auto")


def test_checkpoints_by_steps_and_the_newest_that_are_kept(tmp_path: Path) -> None:
    seen: set[str] = set()

    def on_step(_: Step) -> None:
        trainer.saver.wait()
        seen.update(path.name for path in RunFolder(tmp_path).points())

    config = short("ce", "sgd", epochs=2, batch_size=9, checkpoint_steps=4, keep_last=1)
    trainer = Trainer(config, data=FEW, out=tmp_path, progress=False, on_step=on_step)
    steps = trainer.steps_per_epoch
    trainer.fit()
    places = [divmod(batches, steps) for batches in range(2, 2 * steps - 1, 2)]
    assert {f"epoch-{e}-step-{s}.pt" if s else f"epoch-{e}.pt" for e, s in places} <= seen


def test_checkpoints_by_minutes(tmp_path: Path) -> None:
    names: list[str] = []
    config = short("ce", "sgd", epochs=1, batch_size=9, checkpoint_minutes=1e-9, keep_last=99)

    def on_epoch(_: Any) -> None:
        trainer.saver.wait()
        names.extend(path.name for path in RunFolder(tmp_path).points())

    trainer = Trainer(config, data=FEW, out=tmp_path, progress=False, on_epoch=on_epoch)
    trainer.fit()
    assert len(names) == trainer.steps_per_epoch


def test_a_stopped_run_without_a_folder_says_that_nothing_was_saved() -> None:
    request, on_step = stop_after(1)
    with pytest.raises(Stopped, match="nothing was saved without --out"):
        train(short("ce", "sgd", epochs=1), None, stop=request, on_step=on_step)


def test_a_checkpoint_within_an_epoch_is_not_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request, on_step = stop_after(1)
    with pytest.raises(Stopped):
        train(short("ce", "sgd", batch_size=9), tmp_path, stop=request, on_step=on_step)
    (point,) = RunFolder(tmp_path).points()
    with pytest.raises(CheckpointError, match="within an epoch"):
        TrainedRun.load(point)
    assert main(["spectrum", str(point), "--steps", "1"]) == 1
    assert "within an epoch" in capsys.readouterr().err


def test_weights_in_a_checkpoint_are_those_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written in the background, here after the next step has changed the weights."""
    states: list[dict[str, torch.Tensor]] = []
    following = threading.Semaphore(0)
    config = short("ce", "sam", epochs=1, batch_size=9, checkpoint_steps=4, keep_last=99)

    def late(path: Path, content: Any) -> None:
        following.acquire()
        write_archive(path, content)

    def on_step(_: Step) -> None:
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        if len(states) > 2 and len(states) % 2:  # the step after a checkpoint
            following.release()

    def on_epoch(_: Any) -> None:
        following.release(2)  # also for the checkpoint of the epoch
        trainer.saver.wait()
        points = RunFolder(tmp_path).points()
        assert len(points) >= 3
        for point in points:
            stored = Checkpoint.load(point)
            assert stored.unfinished is not None
            for key, value in states[stored.unfinished["batches"] - 1].items():
                assert torch.equal(value, stored.model[key]), (point, key)

    monkeypatch.setattr("fastsam.longtail.training.saving.write_archive", late)
    trainer = Trainer(
        config, data=FEW, out=tmp_path, progress=False, on_step=on_step, on_epoch=on_epoch
    )
    trainer.fit()


def test_a_damaged_checkpoint_does_not_displace_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a damaged checkpoint of a later step, the run continues from the one before, again and again."""
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = short("ce", "sgd", epochs=2, batch_size=9, checkpoint_steps=2, keep_last=1)
    folder = RunFolder(tmp_path)
    request, on_step = stop_after(12)  # in the second epoch
    with pytest.raises(Stopped):
        train(config, tmp_path, stop=request, on_step=on_step)
    (newest,) = folder.points()
    newest.write_bytes(newest.read_bytes()[:-50])
    assert folder.checkpoint.is_file()
    request, on_step = stop_after(1)
    with pytest.raises(Stopped):
        train(config, tmp_path, resume="auto", stop=request, on_step=on_step)
    (point,) = folder.points()
    assert point != newest
    assert Checkpoint.load(point).unfinished is not None
    assert folder.stopped.exists()
    train(config, tmp_path, resume="auto")
    assert not folder.stopped.exists()


def test_a_failed_write_is_tried_again_and_then_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short("ce", "sgd", epochs=1, batch_size=9, checkpoint_steps=4)
    fails = [True, False]

    def write(path: Path, content: Any) -> None:
        if fails and fails.pop(0):
            raise OSError(f"no space: {path}")
        write_archive(path, content)

    monkeypatch.setattr("fastsam.longtail.training.saving.write_archive", write)
    train(config, tmp_path / "one")
    assert "a checkpoint was not written: no space" in capsys.readouterr().err
    assert Checkpoint.load(tmp_path / "one").epoch == 1
    fails[:] = [True] * 100
    with pytest.raises(OSError, match="no space"):
        train(config, tmp_path / "all")


class RandomFeatures(nn.Module):
    """Drops features by a function, and images by CPU numbers: no module of it is a dropout layer."""

    out_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = functional.dropout(self.layer(images.flatten(1)), 0.5, self.training)
        return features * torch.rand(len(images), 1) if self.training else features


def test_random_numbers_of_any_network_are_seeded_by_the_step(tmp_path: Path) -> None:
    config = short("ce", "sam", model="own:random", epochs=2, batch_size=9)
    model = RandomFeatures()
    _, whole = train(config, None, model=model)
    state = torch.random.get_rng_state()
    request, on_step = stop_after(4)
    with pytest.raises(Stopped):
        train(config, tmp_path, model=model, stop=request, on_step=on_step)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)  # must not matter
    _, resumed = train(config, tmp_path, model=model, resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_signals_are_deferred_only_inside_the_context() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as request:
        with pytest.raises(Stopped, match="stopped by SIGTERM; nothing more was saved"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)  # while the first one is handled
        assert request.signal == "SIGTERM"
    with stop_signals() as request, request.deferred():
        with request.deferred():
            pass
        signal.raise_signal(signal.SIGUSR1)
        assert request.signal == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is before
