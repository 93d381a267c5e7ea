"""Runs whose network is sharded over two ranks: trained, evaluated, saved and resumed like others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.distributed import World
from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.errors import UsageError
from fastsam.longtail.training import Branch
from fastsam.longtail.training.checks import check_run
from python_tests.ranks import run_ranks

RANKS = 2
COMBINATIONS: list[dict[str, Any]] = [
    # Weights stay gathered after an evaluation, when the average is updated.
    {"method": "ce", "optimizer": "sgd", "parallel": "fsdp2", "ema": 0.9},
    # Samples and parts of uneven batches: both ranks make the same number of passes.
    {
        "method": "ce",
        "optimizer": "sam",
        "parallel": "fsdp2",
        "batch_size": 21,
        "accumulate": 4,
        "ascent_share": 0.5,
        "epochs": 1,
    },
    {
        "method": "lade",
        "optimizer": "lpf-sgd",
        "batch_size": 31,
        "lpf_parts": 8,
        "epochs": 1,
    },
]
"""Runs that only need to end: a rank that made another number of passes would wait forever."""


def config_for(**options: Any) -> TrainConfig:
    """Return a short run of SAM that evaluates an average of the best epoch's weights."""
    options = {"epochs": 3, "defer_epoch": 1, "batch_size": 99, "lr": 0.02, **options}
    options = {"select": "best-validation", "ema": 0.9, "ascent_start": "1", **options}
    return recipe("digits-lt", "ce-drw", "sam", **options).config()


def _rank(rank: int, folder: str) -> None:
    world, path = World(rank, RANKS), Path(folder)

    def train(name: str, *, parallel: str, resume: bool = False, stop: int | None = None) -> None:
        trainer = Trainer(
            config_for(parallel=parallel),
            out=path / name,
            resume=resume,
            world=world,
            progress=False,
            keep=[1],
            on_epoch=lambda record: _stop_after(stop, record.epoch),
        )
        trainer.fit()

    train("ddp", parallel="ddp")
    train("fsdp2", parallel="fsdp2")
    for name, first in (("resumed", "fsdp2"), ("changed", "ddp")):
        with pytest.raises(KeyboardInterrupt):
            train(name, parallel=first, stop=2)
        if rank == 0:
            shutil.copyfile(path / name / "epoch-1.pt", path / name / "checkpoint.pt")
        world.barrier()
        train(name, parallel="fsdp2", resume=True)
    branch = Branch.load(path / "fsdp2", 1)
    Trainer(
        config_for(parallel="fsdp2"),
        branch=branch,
        out=path / "branch",
        world=world,
        progress=False,
    ).fit()
    for options in COMBINATIONS:
        config = recipe("digits-lt", **{"epochs": 2, **options}).config()
        found = Trainer(config, world=world, progress=False).fit()
        assert len(found.history) == config.epochs


def _stop_after(stop: int | None, epoch: int) -> None:
    if epoch == stop:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs."""
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(_rank, RANKS, str(folder))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Checkpoint]:
    """Return the last checkpoint of each run by name."""
    names = ("ddp", "fsdp2", "resumed", "changed", "branch")
    return {name: Checkpoint.load(folder / name / "checkpoint.pt") for name in names}


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint by name: weights, average, best weights and momentum."""
    found = {}
    for part in ("model", "average", "best"):
        found |= {f"{part}.{name}": value for name, value in getattr(checkpoint, part).items()}
    for index, entry in checkpoint.optimizer["state"].items():
        found[f"momentum.{index}"] = entry["momentum_buffer"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "changed"])
def test_a_sharded_run_ends_like_a_replicated_one(name: str, runs: dict[str, Checkpoint]) -> None:
    expected, found = tensors(runs["ddp"]), tensors(runs[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert type(found[key]) is torch.Tensor
        difference = (found[key] - value).abs().max() / value.abs().max().clamp_min(1)
        assert difference < 1e-3, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resumed", "branch"])
def test_a_sharded_run_continues_with_the_same_bits(name: str, runs: dict[str, Checkpoint]) -> None:
    expected, found = tensors(runs["fsdp2"]), tensors(runs[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_one_process_continues_with_a_warning(name: str, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / name, run)
    shutil.copyfile(run / "epoch-1.pt", run / "checkpoint.pt")
    with pytest.warns(UserWarning, match="trained by 2 process.* continues with 1"):
        trainer = Trainer(config_for(), out=run, resume=True, keep=[1], progress=False)
    assert len(trainer.fit().history) == 3


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"ascent_scope": "local"}, "ascent_scope local requires whole weights"),
        ({"track_curvature": 5}, "track_curvature requires whole weights"),
        ({"compile": True}, "compile requires whole weights"),
        ({"channels_last": True}, "channels_last requires whole weights"),
        ({"sync_batch_norm": True}, "sync_batch_norm requires a CUDA device"),
        ({"accumulate": 30}, "batch_size must be at least 120"),
    ],
)
def test_what_a_sharded_run_cannot_have(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        check_run(config_for(parallel="fsdp2", **options), World(0, RANKS))


def test_an_optimizer_that_reads_whole_weights_is_refused() -> None:
    config = recipe("digits-lt", "ce", "lpf-sgd", parallel="fsdp2").config()
    with pytest.raises(UsageError, match="optimizer lpf-sgd requires whole weights"):
        check_run(config, World(0, RANKS))


def test_a_loss_that_compares_images_is_not_split() -> None:
    config = recipe("digits-lt", "paco", "sgd", accumulate=2).config()
    with pytest.raises(UsageError, match="accumulate 2 splits a batch, but method paco"):
        Trainer(config, progress=False)
