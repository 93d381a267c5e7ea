"""Frozen parameters, parameter groups and starts on two ranks, with DDP and with a sharded network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.distributed import World
from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.errors import UsageError
from fastsam.longtail.training.checks import check_run
from python_tests.ranks import run_ranks

RANKS = 2
FROZEN = "features.layers.0.weight"


def config_for(folder: Path, optimizer: str = "sam", **options: Any) -> TrainConfig:
    """Return a short run that does not depend on the statistics of a rank's part of a batch."""
    values: dict[str, Any] = {
        "model": "resnet8",
        "epochs": 2,
        "batch_size": 100,
        "augment": False,
        "init": str(folder / "start"),
        "head_from": "class-means",
        "freeze": (FROZEN,),
        "batch_norm": "frozen",
        "lr_scale": ("features.*=0.1",),
        "no_decay": ("vectors",),
        "ema": 0.9,
        **({"base_optimizer": "adamw"} if optimizer == "sam" else {}),
    }
    return recipe("digits-lt", "ce", optimizer, **{**values, **options}).config()


def _rank(rank: int, folder: str) -> None:
    world, path = World(rank, RANKS), Path(folder)
    for parallel in ("ddp", "fsdp2"):
        for optimizer in ("sam", "adamw"):
            config = config_for(path, optimizer, parallel=parallel)
            out = path / f"{parallel}-{optimizer}"
            Trainer(config, out=out, world=world, progress=False).fit()


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    """The oracle is a run of one process. Frozen weights keep the bits of the start."""
    first = recipe("digits-lt", "ce", "sgd", model="resnet8", epochs=1, batch_size=100).config()
    Trainer(first, out=tmp_path / "start", progress=False).fit()
    run_ranks(_rank, RANKS, str(tmp_path))
    start = Checkpoint.load(tmp_path / "start").model
    for optimizer in ("sam", "adamw"):
        Trainer(config_for(tmp_path, optimizer), out=tmp_path / optimizer, progress=False).fit()
        one = Checkpoint.load(tmp_path / optimizer)
        for parallel in ("ddp", "fsdp2"):
            two = Checkpoint.load(tmp_path / f"{parallel}-{optimizer}")
            two.build_model()
            assert one.start == two.start
            for name, value in one.model.items():
                found = two.model[name]
                assert torch.allclose(found, value, rtol=1e-3, atol=1e-4), (parallel, name)
                constant = name == FROZEN or name.endswith(("mean", "var", "tracked"))
                assert not constant or torch.equal(found, start[name]), (parallel, name)
            rates = [group["lr_scale"] for group in two.optimizer["param_groups"]]
            assert rates == [0.1, 1.0, 1.0]


def test_base_optimizers_that_cannot_be_sharded_are_refused() -> None:
    for name, base in (("sam", "torch:RMSprop"), ("torch:RMSprop", None)):
        values: dict[str, Any] = {} if base is None else {"base_optimizer": base}
        config = recipe("digits-lt", "ce", name, parallel="fsdp2", **values).config()
        with pytest.raises(UsageError, match=r"optimizer torch:RMSprop requires whole weights"):
            check_run(config, World(0, 2))
