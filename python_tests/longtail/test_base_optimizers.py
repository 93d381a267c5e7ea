"""Base optimizers: what they are built with, trajectories against plain torch, and older settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fastsam import SAM
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.base_optimizers import BASE_OPTIMIZERS
from fastsam.longtail.build import build_network, build_optimizer
from fastsam.longtail.checkpoint import Checkpoint, checkpoint_bytes
from fastsam.longtail.config import TrainConfig
from fastsam.longtail.differences import differences
from fastsam.longtail.errors import UsageError
from fastsam.longtail.optimizers import OPTIMIZERS
from fastsam.longtail.training import Branch

ASCENTS = ("sam", "asam", "looksam")
SMALL = {"model": "resnet8", "batch_size": 128}


def state_tensors(optimizer: dict[str, Any]) -> list[Tensor]:
    return [
        value
        for entry in optimizer["state"].values()
        for value in entry.values()
        if isinstance(value, Tensor) and value.ndim
    ]


@pytest.mark.parametrize("ascends", [False, True])
def test_two_groups_of_adamw_follow_plain_torch(ascends: bool) -> None:
    """The reference writes out schedule, groups and passes, with torch's AdamW."""
    values: dict[str, Any] = {**SMALL, "lr_scale": ("features.*=0.1",), "epochs": 2}
    name = "sam" if ascends else "adamw"
    if ascends:
        values |= {"base_optimizer": "adamw", "rho": 0.1}
    config = recipe("digits-lt", "ce", name, **values).config()
    trainer = Trainer(config, progress=False)
    images = {
        (epoch, number): (batch.inputs.clone(), batch.targets.clone())
        for epoch in (1, 2)
        for number, batch in enumerate(trainer.batches.read(epoch))
    }
    trainer.fit()

    model = build_network(config, 10, 1).train()
    features = [p for name, p in model.named_parameters() if name.startswith("features.")]
    groups: list[dict[str, Any]] = [
        {"params": features, "lr_scale": 0.1},
        {"params": list(model.head.parameters()), "lr_scale": 1.0},
    ]
    optimizer: Any = AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    if ascends:
        optimizer = SAM(optimizer=optimizer, rho=0.1)
    criterion = nn.CrossEntropyLoss()
    for (epoch, _), (inputs, targets) in images.items():
        for group in optimizer.param_groups:
            group["lr"] = trainer.schedules["lr"](epoch) * group["lr_scale"]
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        if ascends:
            optimizer.first_step(zero_grad=True)
            kept = {k: v.clone() for k, v in model.named_buffers()}
            criterion(model(inputs), targets).backward()
            model.load_state_dict(kept, strict=False)
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key]), key
    assert [group["lr_scale"] for group in trainer.optimizer.param_groups] == [0.1, 1.0]


@pytest.mark.parametrize("base", ["adam", "adamw", "torch:RMSprop", "torch:NAdam"])
@pytest.mark.parametrize("name", ["sam", "asam", "looksam", "pgd", "lpf-sgd", "entropy-sgd"])
def test_every_optimizer_has_any_base(name: str, base: str) -> None:
    config = recipe("digits-lt", "ce", name, base_optimizer=base, **SMALL).config()
    model = build_network(config, 10, 1)
    optimizer = build_optimizer(config, model, steps_per_epoch=3)
    assert config.lr == optimizer.param_groups[0]["lr"]
    inner: Any = optimizer
    while hasattr(inner, "base_optimizer"):  # LookSAM is around SAM
        inner = inner.base_optimizer
    assert type(inner).__name__.lower() == base.removeprefix("torch:").lower()


def test_base_optimizers_alone_are_optimizers() -> None:
    for name in ("sgd", "adam", "adamw"):
        assert OPTIMIZERS[name].settings is BASE_OPTIMIZERS[name].settings
    config = recipe("cifar10-lt", "ce", "torch:RMSprop", torch_options=("alpha=0.5",)).config()
    assert config.lr == 0.01  # torch's
    made = build_optimizer(config, build_network(config, 10, 3), steps_per_epoch=3)
    assert made.param_groups[0]["alpha"] == 0.5
    for options, message in (
        (("alpha",), "must be OPTION=VALUE"),
        (("lr=1",), "lr and weight_decay are settings of the run"),
        (("beta=1",), "unknown option of torch.optim.RMSprop 'beta'"),
    ):
        with pytest.raises(UsageError, match=message):
            build_optimizer(
                config.replace(torch_options=options),
                build_network(config, 10, 3),
                steps_per_epoch=3,
            )
    with pytest.raises(UsageError, match=r"unknown optimizer of torch\.optim 'RMSProp'"):
        recipe("digits-lt", "ce", "torch:RMSProp")
    with pytest.raises(UsageError, match="unknown base_optimizer 'adamz'"):
        recipe("digits-lt", "ce", "sam", base_optimizer="adamz")
    with pytest.raises(UsageError, match="base_optimizer requires optimizer asam"):
        recipe("digits-lt", "ce", "sgd", base_optimizer="adamw")


def test_options_that_clash_with_sam_are_reported() -> None:
    config = recipe("digits-lt", "ce", "sam", base_optimizer="torch:Adadelta", **SMALL).config()
    with pytest.raises(
        UsageError, match=r"with base_optimizer torch:Adadelta.*rho.*choose another"
    ):
        build_optimizer(config, build_network(config, 10, 1), steps_per_epoch=3)


@pytest.mark.parametrize("name", ASCENTS)
def test_settings_stored_before_there_were_base_optimizers(name: str) -> None:
    config = recipe("digits-lt", "ce", name, **SMALL).config()
    new = ("base_optimizer", "freeze", "lr_scale", "no_decay", "layer_decay", "batch_norm")
    stored = {key: value for key, value in config.as_dict().items() if key not in new}
    assert TrainConfig.from_dict(stored) == config
    assert differences(stored, config.as_dict()) == []
    del stored["nesterov"]
    assert TrainConfig.from_dict(stored) == config


@pytest.mark.slow
def test_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    """The estimate exceeds the file by less than the space for the other entries."""
    for name, more in (("adamw", {}), ("sam", {"base_optimizer": "adamw"}), ("looksam", {})):
        config = recipe("digits-lt", "ce", name, epochs=1, **SMALL, **more).config()
        trainer = Trainer(config, out=tmp_path / name, progress=False)
        trainer.fit()
        size = (tmp_path / name / "checkpoint.pt").stat().st_size
        assert 0 <= checkpoint_bytes(config, trainer.model) - size < 1 << 16


@pytest.mark.slow
def test_a_branch_takes_over_the_moments_of_its_base(tmp_path: Path) -> None:
    config = recipe("digits-lt", "ce", "adamw", epochs=2, **SMALL).config()
    Trainer(config, out=tmp_path / "a", keep=(1,), progress=False).fit()
    kept = Checkpoint.load(tmp_path / "a" / "epoch-1.pt")
    branch = Branch.load(tmp_path / "a", 1)
    late, _ = branch.settings(optimizer="sam")
    assert late.base_optimizer == "adamw"
    trainer = Trainer(late, branch=branch, progress=False)
    ours, theirs = trainer.optimizer.state_dict(), kept.optimizer
    for one, other in zip(state_tensors(ours), state_tensors(theirs), strict=True):
        assert torch.equal(one, other)
    trainer.fit()

    frozen, _ = branch.settings(optimizer="sam", freeze=("features.layers.0.*",))
    trainer = Trainer(frozen, branch=branch, progress=False)
    names = trainer.optimizer.param_groups[0]["param_names"]
    places = theirs["param_groups"][0]["param_names"]
    assert names == [name for name in places if name != "features.layers.0.weight"]
    for index, name in enumerate(names):
        moment = trainer.optimizer.state_dict()["state"][index]["exp_avg"]
        assert torch.equal(moment, theirs["state"][places.index(name)]["exp_avg"])

    other, _ = branch.settings(optimizer="sam", base_optimizer="sgd")
    assert not Trainer(other, branch=branch, progress=False).optimizer.state_dict()["state"]
