"""Checkpoints and atomic files: damage is detected, and nothing is lost."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsam.longtail import Checkpoint, Trainer, recipe
from fastsam.longtail.errors import CheckpointError, DamagedError
from fastsam.longtail.models import build_model
from fastsam.longtail.results import Epoch
from fastsam.longtail.trained import TrainedRun, evaluate_run
from fastsam.longtail.training import Branch


def checkpoint(**changes: object) -> Checkpoint:
    values = {
        "config": recipe("digits-lt", "ce", "sam").config(),
        "epoch": 3,
        "channels": 1,
        "num_classes": 10,
        "model": build_model("resnet8", 10, channels=1).state_dict(),
        "optimizer": {},
        "history": [Epoch(k, 0.1, 0.05, 1.0, 50.0, None, 1.0) for k in (1, 2, 3)],
    }
    return Checkpoint(**{**values, **changes})  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    saved = checkpoint()
    saved.save(tmp_path / "checkpoint.pt")
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        loaded = Checkpoint.load(path)
        assert loaded.config == saved.config
        assert loaded.epoch == 3
        model = loaded.build_model()
        assert all(torch.equal(v, saved.model[k]) for k, v in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_truncation_anywhere_is_noticed(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint().save(path)
    whole = path.read_bytes()
    for size in [0, 1, *np.random.default_rng(seed).integers(2, len(whole) - 1, 5).tolist()]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated, damaged or was not"):
            Checkpoint.load(path)


class Trap:
    """An object whose unpickling would execute code."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code of a checkpoint was run",))


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Checkpoint.load(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="not written by fastsam"):
        Checkpoint.load(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="cannot read"):
        Checkpoint.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of `fastsam train`"):
        Checkpoint.load(path)
    torch.save({"format": "fastsam-longtail", "version": 99}, path)
    with pytest.raises(
        CheckpointError, match=r"version 99, but this version of fastsam reads 1, 2"
    ):
        Checkpoint.load(path)
    torch.save({"format": "fastsam-longtail", "version": 1, "epoch": 1}, path)
    with pytest.raises(CheckpointError, match="is not a valid checkpoint"):
        Checkpoint.load(path)


def test_runs_that_drew_augmentation_differently_are_read_but_not_continued(tmp_path: Path) -> None:
    digits = {"epochs": 2, "batch_size": 100, "lr_milestones": (1, 2), "warmup_epochs": 0}
    config = recipe("digits-lt", "ce", "sgd", model="resnet8", **digits).config()
    run = Trainer(config, out=tmp_path / "run", keep=(1,), progress=False)
    result = run.fit()
    for name in ("checkpoint", "epoch-1"):
        path = tmp_path / "run" / f"{name}.pt"
        content = torch.load(path, weights_only=True)
        assert content["version"] == 3
        torch.save({**content, "version": 1}, path)
    older = Checkpoint.load(tmp_path / "run")
    older.save(tmp_path / "again.pt")
    assert Checkpoint.load(tmp_path / "again.pt").version == 1
    assert evaluate_run(TrainedRun.load(tmp_path / "run"), bootstrap=0).metrics == result.test
    for resume in (True, "auto"):
        with pytest.raises(
            CheckpointError, match=r"cannot resume from .*drew augmentation differ.*"
        ):
            Trainer(config, out=tmp_path / "run", resume=resume, keep=(1,), progress=False)
    branch = Branch.load(tmp_path / "run", 1)
    settings, _ = branch.settings(lr=0.01)
    with pytest.raises(
        CheckpointError, match=r"cannot branch from run: .*train again \(--overwrite\)"
    ):
        Trainer(settings, branch=branch, progress=False)
    torch.save({**content, "version": 2}, tmp_path / "run" / "checkpoint.pt")
    Trainer(config, out=tmp_path / "run", resume=True, progress=False)
    Trainer(config, out=tmp_path / "run", overwrite=True, progress=False).fit()
    assert Checkpoint.load(tmp_path / "run").version == 3


def test_fields_missing_in_older_versions_have_defaults(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    checkpoint(sources={"lr": "a table"}).save(path)
    assert Checkpoint.load(path).sources == {"lr": "a table"}
    content = torch.load(path, weights_only=True)
    del content["sources"]
    torch.save(content, path)
    assert Checkpoint.load(path).sources == {}
    del content["history"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="is not a valid checkpoint"):
        Checkpoint.load(path)


def test_weights_of_another_model_are_refused() -> None:
    other = build_model("resnet20", 10, channels=1).state_dict()
    with pytest.raises(CheckpointError, match="do not fit a resnet8 with 10 classes"):
        checkpoint(model=other).build_model()
    with pytest.raises(CheckpointError, match="do not fit a resnet8 with 7 classes"):
        checkpoint(num_classes=7).build_model()


def trained(folder: Path) -> Path:
    """Create the checkpoint of a short run with an optimizer state."""
    config = recipe("digits-lt", "ce", "sam", epochs=1).config()
    Trainer(config, out=folder, progress=False).fit()
    return folder / "checkpoint.pt"


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def test_flipped_bits_are_noticed_or_change_nothing(tmp_path: Path) -> None:
    """Padding and dates of an archive may change; loaded values may not."""
    path = trained(tmp_path)
    whole = path.read_bytes()
    original = vars(Checkpoint.load(path))
    generator = np.random.default_rng(14)
    refused = 0
    for place in generator.integers(0, 8 * len(whole), 500).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            loaded = vars(Checkpoint.load(path))
        except CheckpointError as error:
            refused += len(str(error).splitlines()) == 1
        else:
            assert same(loaded, original), f"bit {place} was accepted"
    assert refused > 350


def test_a_flipped_bit_inside_a_weight_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    saved = checkpoint()
    saved.save(path)
    content = bytearray(path.read_bytes())
    place = content.index(saved.model["head.weight"].numpy().tobytes()[:64])
    content[place + 3] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"checksum of .*data/.* is wrong"):
        Checkpoint.load(path)


def test_checksums_are_written_whatever_torch_is_set_to(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint().save(tmp_path / "x.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert Checkpoint.load(tmp_path / "x.pt").epoch == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epoch", 2, "epochs 1 to 2 in the history, got 3"),
        ("epoch", "3", "epoch must be a whole number, got '3'"),
        ("epoch", True, "epoch must be a whole number"),
        ("history", [{"epoch": 1}], "missing"),
        ("history", "abc", "history must be"),
        ("channels", 0, "got 0 and 10"),
        ("num_classes", None, "num_classes must be a whole number"),
        ("model", {"features.conv.weight": 3}, "must be a tensor"),
        ("model", None, "model must be a mapping"),
        ("optimizer", [], "optimizer must be a mapping"),
        ("best", {"x": "y"}, "must be a tensor"),
        ("unreadable", {"a.jpg": "many"}, "unreadable"),
        ("config", {"data": 5}, "data must be a string, got 5"),
        ("config", {"data": "digits-lt"}, "method is missing"),
        ("config", None, "must be a mapping"),
        ("version", None, "version None, but this version of fastsam reads 1"),
        ("version", torch.ones(2), "this version of fastsam reads 1"),
    ],
)
def test_fields_of_wrong_types_or_that_disagree(
    name: str, value: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    checkpoint().save(path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, name: value}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.load(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", "fast", "lr must be a number"),
        ("epochs", 1.5, "epochs must be a whole number"),
        ("rho", 0.1, "rho"),
    ],
)
def test_settings_of_wrong_types(setting: str, value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    checkpoint().save(path)
    content = torch.load(path, weights_only=True)
    content["config"][setting] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load(path)


def test_a_refused_pickle_comes_without_the_advice_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"format": "fastsam-longtail", "trap": Trap()}, path)
    with pytest.raises(DamagedError, match="objects that are not plain data") as caught:
        Checkpoint.load(path)
    assert "weights_only" not in str(caught.value).lower().replace(" ", "_")


def test_an_optimizer_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    path = trained(tmp_path)
    good = Checkpoint.load(path)
    run = Trainer(good.config, out=tmp_path, resume=True, progress=False)
    state = good.optimizer["state"]
    first = min(index for index in state if state[index])
    spoiled = (
        {**state, first: {"momentum_buffer": torch.zeros(3)}},
        {**state, 10_000: state[first]},
        {**state, first: None},
    )
    for entries in spoiled:
        wrong = replace(good, optimizer={**good.optimizer, "state": entries})
        with pytest.raises(CheckpointError, match="does not fit sam on this network"):
            wrong.load_optimizer(run.optimizer)
    groups = [{**group, "momentum": 0.1} for group in good.optimizer["param_groups"]]
    with pytest.raises(CheckpointError, match=r"expected momentum 0\.9, got 0\.1"):
        replace(good, optimizer={**good.optimizer, "param_groups": groups}).load_optimizer(
            run.optimizer
        )
    with pytest.raises(CheckpointError, match="does not fit sam"):
        replace(good, optimizer={}).load_optimizer(run.optimizer)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = build_model("resnet8", 10, channels=1).state_dict()
    model["head.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match=r"infinite or NaN .* in head\.bias"):
        checkpoint(model=model).build_model()
