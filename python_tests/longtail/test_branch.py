"""Branches: bit-exact continuation with the parent's settings, changed settings, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.cli import main
from fastsam.longtail import Checkpoint, Result, TrainConfig, Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.errors import CheckpointError, DamagedError, UsageError
from fastsam.longtail.training import Branch

DIGITS = load_digits_lt()
SHORT = {"epochs": 4, "batch_size": 100, "lr": 0.05, "warmup_epochs": 0, "lr_milestones": (2, 3)}


def config_for(optimizer: str, method: str = "ce-drw", **settings: Any) -> TrainConfig:
    options = {**SHORT, "defer_epoch": 2, **settings}
    return recipe("digits-lt", method, optimizer, **options).config()


def trained(config: TrainConfig, out: Path | None = None, **options: Any) -> Result:
    return Trainer(config, data=DIGITS, out=out, progress=False, **options).fit()


def same(one: Path, other: Path) -> bool:
    first, second = Checkpoint.load(one).model, Checkpoint.load(other).model
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "looksam", "pgd", "entropy-sgd"])
def test_a_branch_with_the_same_settings_has_the_bits_of_the_run(
    optimizer: str, tmp_path: Path
) -> None:
    config = config_for(optimizer)
    whole = trained(config, tmp_path / "whole", keep=(2,))
    branch = Branch.load(tmp_path / "whole", 2)
    settings, sources = branch.settings()
    assert settings == config
    assert sources["lr"] == "run whole"
    result = trained(settings, tmp_path / "branch", branch=branch, sources=sources)
    assert same(tmp_path / "whole", tmp_path / "branch")
    assert [r.loss for r in result.history] == [r.loss for r in whole.history]
    assert result.parent is not None
    assert (result.parent["run"], result.parent["epoch"]) == ("whole", 2)
    assert result.parent["config"] == config.as_dict()


def test_sgd_to_sam_is_sam_that_begins_late(tmp_path: Path) -> None:
    trained(config_for("sgd"), tmp_path / "sgd", keep=(2,))
    branch = Branch.load(tmp_path / "sgd", 2)
    settings, _ = branch.settings(optimizer="sam", rho=0.1)
    assert settings == config_for("sam", rho=0.1)
    run = Trainer(settings, data=DIGITS, out=tmp_path / "b", branch=branch, progress=False)
    assert run.optimizer.attempted_steps == 2 * run.steps_per_epoch  # type: ignore[attr-defined]
    result = run.fit()
    trained(config_for("sam", rho=0.1, ascent_start=2), tmp_path / "late")
    assert same(tmp_path / "b", tmp_path / "late")
    assert [r.gradients for r in result.history] == [3, 3, 6, 6]


def test_sam_to_sgd_and_late_settings(tmp_path: Path) -> None:
    trained(config_for("sam"), tmp_path / "sam", keep=(2,))
    branch = Branch.load(tmp_path / "sam", 2)
    changed = {"optimizer": "sgd", "lr_factors": (0.3, 0.03), "weight_decay": 5e-3, "method": "ce"}
    settings, sources = branch.settings(**changed)
    assert (settings.optimizer, settings.rho, settings.defer_epoch) == ("sgd", None, None)
    assert (settings.lr_factors, sources["lr_factors"]) == ((0.3, 0.03), "given")
    result = trained(settings, branch=branch)
    assert [r.lr for r in result.history][2:] == pytest.approx([0.05 * 0.3, 0.05 * 0.03])
    run = Trainer(settings, data=DIGITS, branch=branch, progress=False)
    assert {g["weight_decay"] for g in run.optimizer.param_groups} == {5e-3}
    stored = Checkpoint.load(tmp_path / "sam" / "epoch-2.pt").optimizer["state"]
    for index, parameter in enumerate(run.optimizer.param_groups[0]["params"]):
        momentum = run.optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, stored[index]["momentum_buffer"])


@pytest.mark.parametrize("optimizer", ["torch:RMSprop", "looksam"])
def test_a_branch_to_sam_takes_over_the_state_of_the_base(optimizer: str, tmp_path: Path) -> None:
    base = {"base_optimizer": "torch:RMSprop"} if optimizer == "looksam" else {}
    config = config_for(
        optimizer, model="resnet8", torch_options=("momentum=0.5",), **base, weight_decay=0.0
    )
    trained(config, tmp_path / "run", keep=(2,))
    branch = Branch.load(tmp_path / "run", 2)
    settings, _ = branch.settings(optimizer="sam")
    run = Trainer(settings, data=DIGITS, branch=branch, progress=False)
    stored, found = (
        made["state"] for made in (branch.checkpoint.optimizer, run.optimizer.state_dict())
    )
    assert found.keys() == stored.keys()
    for index, entry in found.items():
        assert entry.keys() == {"step", "square_avg", "momentum_buffer"}
        assert all(torch.equal(value, stored[index][name]) for name, value in entry.items())


def test_a_branch_that_is_killed_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    trained(config_for("sgd"), tmp_path / "sgd", keep=(2,))
    branch = Branch.load(tmp_path / "sgd", 2)
    settings, _ = branch.settings(optimizer="sam", rho=0.1)
    trained(settings, tmp_path / "whole", branch=branch)

    def stop(step: Any) -> None:
        if step.epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(settings, tmp_path / "cut", branch=branch, on_step=stop)
    result = trained(settings, tmp_path / "cut", resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert result.parent == branch.parent


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 50}, "cannot change batch_size"),
        ({"model": "resnet20"}, "cannot change model"),
        ({"imbalance": 10.0}, "cannot change imbalance"),
        ({"method": "paco"}, "cannot change loss ce to paco"),
        ({"method": "ldam-drw"}, "requires head='cosine'"),
        ({"epochs": 2, "lr_milestones": (1, 2), "defer_epoch": 1}, "epochs must be above 2"),
        ({"select": "best-validation"}, "did not store"),
    ],
)
def test_settings_that_a_branch_cannot_change(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trained(config_for("sgd", epochs=3), tmp_path / "run", keep=(2,))
    branch = Branch.load(tmp_path / "run", 2)

    def begin() -> None:
        settings, _ = branch.settings(**changes)
        Trainer(settings, branch=branch, out=tmp_path / "b", progress=False)

    with pytest.raises(UsageError, match=message):
        begin()
    assert not (tmp_path / "b").exists()


def test_an_epoch_that_was_not_kept_is_named(tmp_path: Path) -> None:
    trained(config_for("sgd"), tmp_path / "run", keep=(1, 3))
    with pytest.raises(CheckpointError, match=r"epoch 2, only of: 1, 3, 4\. .* --keep 2"):
        Branch.load(tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match="does not exist; pass the folder of a run"):
        Branch.load(tmp_path / "nothing", 2)
    with pytest.raises(CheckpointError, match="is a file; pass the folder of a run"):
        Branch.load(tmp_path / "run" / "epoch-1.pt", 1)
    assert Branch.load(tmp_path / "run", 4).checkpoint.epoch == 4
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
    assert Branch.load(tmp_path / "run", 3).checkpoint.epoch == 3
    with pytest.raises(DamagedError, match=r"checkpoint\.pt"):
        Branch.load(tmp_path / "run", 4)


def test_the_command_line_branches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "b")
    short = ["--epochs", "3", "--batch-size", "100", "--quiet"]
    assert main(["train", "--optimizer", "sgd", *short, "--keep", "2", "--out", run]) == 0
    branch = ["train", "--from", run, "--at", "2", "--optimizer", "sam", "--rho", "0.1"]
    assert main([*branch, "--quiet", "--out", out]) == 0
    result = Result.load(tmp_path / "b" / "result.json")
    assert result.parent is not None
    assert (result.config["epochs"], result.config["rho"]) == (3, [0.1])
    capsys.readouterr()
    for wrong, message in (
        (["--from", run], "require each other"),
        (["--from", run, "--at", "1"], "has no checkpoint of epoch 1"),
        ([*branch[1:], "--resume", "--out", out], "--from cannot be combined with a bare --resume"),
        ([*branch[1:], "--batch-size", "50", "--out", str(tmp_path / "c")], "cannot change"),
    ):
        assert main(["train", *wrong, "--quiet"]) in (1, 2)
        assert message in capsys.readouterr().err
