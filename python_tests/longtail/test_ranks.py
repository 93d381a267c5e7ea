"""Training on two processes takes the same steps as one process on whole batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastsam.distributed import World
from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.errors import UsageError
from fastsam.longtail.models import cifar_resnet
from fastsam.longtail.sharding import gathered
from fastsam.longtail.training import RunFolder
from python_tests.longtail.archives import write_listed
from python_tests.ranks import run_processes, run_ranks

COMBINATIONS = [
    ("ce-drw", "sam"),
    ("ldam-drw", "sgd"),
    ("ib-drs", "looksam"),
    ("vs-rs", "lpf-sgd"),
    ("focal-rw", "entropy-sgd"),
]
MIXERS = {"ce-drw": "cmo", "ldam-drw": "mixup"}
"""Mixer of the runs of some methods."""


def config_for(method: str, optimizer: str) -> Any:
    # Batches of odd size are uneven on two ranks. LPF-SGD would then cut them into other parts.
    size = 100 if optimizer == "lpf-sgd" else 99
    options: dict[str, Any] = {"epochs": 2, "batch_size": size, "lr": 0.02, "augment": False}
    if method.endswith(("drw", "drs")):
        options["defer_epoch"] = 1
    options["mixer"] = MIXERS.get(method, "none")
    if options["mixer"] == "cmo":
        options |= {"cmo_skip_first": 0, "cmo_skip_last": 0}
    if optimizer == "looksam":
        # With a smaller rho the difference of the two gradients is mostly rounding.
        options["rho"] = (0.2,)
    if optimizer == "lpf-sgd":
        # Rounding of the norms would otherwise be the only difference that grows.
        options["lpf_gamma"] = 1e-4
    return recipe("digits-lt", method, optimizer, **options).config()


def _without_batch_statistics(width: int) -> nn.Module:
    """Batch normalization depends on the rank's part of the batch, so the networks have none."""
    return nn.GroupNorm(4, width)


def _train(rank: int, size: int, folder: str) -> None:
    cifar_resnet.nn.BatchNorm2d = _without_batch_statistics  # type: ignore[assignment,misc]
    for method, optimizer in COMBINATIONS:
        run = Trainer(
            config_for(method, optimizer),
            out=Path(folder) / f"{method}-{optimizer}-{size}",
            world=World(rank, size),
            progress=False,
        )
        result = run.fit()
        state = {"weights": run.model.state_dict(), "accuracy": result.test.accuracy}
        state["losses"] = [epoch.loss for epoch in result.history]
        state["validation"] = [epoch.validation_accuracy for epoch in result.history]
        torch.save(state, f"{folder}/{method}-{optimizer}-{size}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    run_processes(_train, 1, 1, str(tmp_path))
    run_ranks(_train, 2, 2, str(tmp_path))
    for method, optimizer in COMBINATIONS:
        name = f"{method}-{optimizer}"
        alone, first, second = (
            torch.load(tmp_path / f"{name}-{which}.pt", weights_only=True)
            for which in ("1-0", "2-0", "2-1")
        )
        for key, value in alone["weights"].items():
            assert torch.equal(first["weights"][key], second["weights"][key]), (name, key)
            assert torch.allclose(value, first["weights"][key], rtol=1e-3, atol=2e-4), (name, key)
        assert first["losses"] == second["losses"]
        assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        assert first["accuracy"] == second["accuracy"]
        assert first["validation"] == second["validation"]
        assert Checkpoint.load(tmp_path / f"{name}-2").epoch == 2


@pytest.mark.slow
def test_torchrun_trains_and_writes_once(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "fastsam", "train", "--method", "ldam-drw", "--epochs", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, *launcher, *command, "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results:") == 1
    assert '"processes": 2' in RunFolder(tmp_path / "run").result.read_text()


def _skip(rank: int, folder: str, parallel: str) -> None:
    options = {"model": "resnet8", "image_size": 16, "workers": 0, "epochs": 2, "batch_size": 12}
    config = recipe(
        "list", "ce", "sam", data_root=folder, corrupt="skip", parallel=parallel, **options
    ).config()
    run = Trainer(config, world=World(rank, 2), progress=False)
    lost = run.data.train.images.paths[3]  # type: ignore[attr-defined]
    dist.barrier()
    if rank == 0:
        (Path(folder) / lost).write_bytes(b"lost while the run was prepared")
    dist.barrier()
    result = run.fit()
    torch.save((lost, result.unreadable, flat_weights(run)), f"{folder}/{rank}.pt")


def flat_weights(run: Trainer) -> torch.Tensor:
    return torch.cat([gathered(p.detach()).flatten() for p in run.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_unreadable_images_are_skipped_on_two_processes(parallel: str, tmp_path: Path) -> None:
    lists = {"train.txt": ("train", [8, 14, 9]), "test.txt": ("test", [3, 3, 3])}
    write_listed(tmp_path, lists)
    broken = sorted((tmp_path / "train").rglob("*.JPEG"))[0]
    broken.write_bytes(b"no image")
    run_ranks(_skip, 2, str(tmp_path), parallel)
    (lost, unreadable, weights), (_, other, other_weights) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert unreadable == other == {str(broken.relative_to(tmp_path)): 1, lost: 2}
    assert torch.equal(weights, other_weights)


def test_settings_that_require_one_process() -> None:
    two = World(0, 2)
    with pytest.raises(UsageError, match=r"at least 4 for 2 process\(es\) and accumulate=1, got 3"):
        Trainer(recipe("digits-lt", "ce", "sgd", batch_size=3).config(), world=two)
