"""Runs in stages on two ranks, with DDP and with a sharded network."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from fastsam.distributed import World
from fastsam.longtail import Checkpoint, Result, TrainConfig, fit_stages
from fastsam.longtail.errors import UsageError
from python_tests.longtail.test_interrupted import compared
from python_tests.longtail.test_stages import staged
from python_tests.longtail.test_trainer import FEW
from python_tests.ranks import run_ranks
from python_tests.test_killed import children
from python_tests.test_preempted import (
    assert_same,
    finish,
    most_repeated,
    start,
    state,
    steps_of,
    wait_for_point,
)

RANKS = 2
LISTS = ("crt", "mislas", "lws", "disalign")
PARALLEL = ("ddp", "fsdp2")


def config_for(name: str, parallel: str = "ddp") -> TrainConfig:
    """Return a short run that does not depend on the statistics of a rank's part of a batch."""
    return staged(
        name,
        "classifier.batch_norm=frozen",
        "classifier.epochs=2",
        model="resnet8",
        augment=False,
        batch_norm="frozen",
        parallel=parallel,
    )


def _rank(rank: int, folder: str) -> None:
    for parallel in PARALLEL:
        for name in LISTS:
            out = Path(folder) / f"{parallel}-{name}"
            config = config_for(name, parallel)
            fit_stages(config, data=FEW, out=out, world=World(rank, RANKS), progress=False)


@pytest.mark.slow
def test_two_ranks_train_the_stages_that_one_trains(tmp_path: Path) -> None:
    run_ranks(_rank, RANKS, str(tmp_path))
    for name in LISTS:
        alone = fit_stages(config_for(name), data=FEW, out=tmp_path / name, progress=False)
        for parallel in PARALLEL:
            for part in ("stage-1", "."):
                path = tmp_path / f"{parallel}-{name}" / part
                one, two = Checkpoint.load(tmp_path / name / part), Checkpoint.load(path)
                assert one.model.keys() == two.model.keys()
                for key, value in one.model.items():
                    found = two.model[key]
                    assert torch.allclose(found, value, rtol=1e-3, atol=1e-4), (path, key)
            result = Result.load(tmp_path / f"{parallel}-{name}" / "result.json")
            assert result.total_gradients == alone.total_gradients
            assert [stage["name"] for stage in result.earlier_stages] == ["representation"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parallel"), [("crt", "ddp"), ("mislas", "fsdp2")])
def test_ranks_killed_in_the_second_stage_end_with_the_same_bits(
    name: str, parallel: str, tmp_path: Path
) -> None:
    """torchrun starts both ranks again, after a kill within an epoch and one after an epoch."""
    command = [
        *("train", "--data", "digits-lt", "--method", "ce", "--optimizer", "sam", "--stages", name),
        *("--model", "resnet8", "--epochs", "1", "--batch-size", "48", "--parallel", parallel),
        *("--stage-set", "classifier.epochs=4", "--checkpoint-steps", "6", "--threads", "1"),
        *("--resume", "auto", "--quiet"),
    ]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    expected = finish(whole, ranks=RANKS, command=command)
    process = start(out, ranks=RANKS, command=command)
    newest = ""
    for victim, within in enumerate((True, False)):
        newest = wait_for_point(out, process, newest, within=within)
        os.kill(children(process.pid)[victim], signal.SIGKILL)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error
    assert_same(state(out), expected)
    assert_same(Checkpoint.load(out / "stage-1").model, Checkpoint.load(whole / "stage-1").model)
    for rank in range(RANKS):
        assert steps_of(out / "stage-1", rank).count("start") == 1
        assert steps_of(out, rank).count("start") >= 3
        assert most_repeated(steps_of(out, rank)) <= 6
    results = [Result.load(folder / "result.json") for folder in (whole, out)]
    assert compared(results[0]) == compared(results[1])


def test_stages_of_a_sharded_network_require_a_folder() -> None:
    with pytest.raises(UsageError, match=r"stages of a sharded network are .*pass --out DIR"):
        fit_stages(config_for("crt", "fsdp2"), data=FEW, world=World(0, RANKS), progress=False)
