"""Checkpoints and atomic files: damage is noticed, and nothing is lost."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from fastsam.files import write_atomically, write_text
from fastsam.longtail import Checkpoint, recipe
from fastsam.longtail.errors import CheckpointError
from fastsam.longtail.models import build_model
from fastsam.longtail.results import Epoch


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


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint().save(path)
    whole = path.read_bytes()
    for size in [0, 1, *np.random.default_rng().integers(2, len(whole) - 1, 5).tolist()]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated, damaged or not"):
            Checkpoint.load(path)


class Trap:
    """Unpickling this would run code."""

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
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of `fastsam train`"):
        Checkpoint.load(path)
    torch.save({"format": "fastsam-longtail", "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99, this package reads 1"):
        Checkpoint.load(path)
    torch.save({"format": "fastsam-longtail", "version": 1, "epoch": 1}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        Checkpoint.load(path)


def test_what_an_older_version_did_not_write_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    checkpoint(sources={"lr": "a table"}).save(path)
    assert Checkpoint.load(path).sources == {"lr": "a table"}
    content = torch.load(path, weights_only=True)
    del content["sources"]
    torch.save(content, path)
    assert Checkpoint.load(path).sources == {}
    del content["history"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        Checkpoint.load(path)


def test_weights_of_another_model_are_refused() -> None:
    other = build_model("resnet20", 10, channels=1).state_dict()
    with pytest.raises(CheckpointError, match="not of a resnet8 with 10 classes"):
        checkpoint(model=other).build_model()
    with pytest.raises(CheckpointError, match="not of a resnet8 with 7 classes"):
        checkpoint(num_classes=7).build_model()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    write_text(path, "old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]
