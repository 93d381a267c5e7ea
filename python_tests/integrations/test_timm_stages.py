"""A network of timm, frozen and then unfrozen: a killed command ends on the bits of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastsam.longtail import Checkpoint, Result
from fastsam.longtail.training import RunFolder
from python_tests.longtail.test_interrupted import compared
from python_tests.test_killed import write_images
from python_tests.test_preempted import (
    assert_same,
    finish,
    most_repeated,
    start,
    steps_of,
    wait_for_point,
)

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.slow


NAME = "test_resnet"


def command_for(folder: Path) -> list[str]:
    """Return a linear probe of two epochs, then SAM of four epochs of eight steps on all parameters."""
    torch.save(timm.create_model(NAME, num_classes=5).state_dict(), folder / "weights.pt")
    write_images(folder / "data")
    return [
        *("train", "--data", "folder", "--data-root", str(folder / "data"), "--workers", "0"),
        *("--model", f"timm:{NAME}", "--pretrained", str(folder / "weights.pt")),
        *("--normalization", "network", "--image-size", "32", "--method", "ce"),
        *("--optimizer", "sam", "--base-optimizer", "adamw", "--batch-size", "4"),
        *("--epochs", "2", "--ema", "0.9"),
        *("--stages", "fine-tuning", "--stage-set", "tuning.epochs=4", "--threads", "1"),
        *("--checkpoint-steps", "6", "--resume", "auto", "--quiet"),
    ]


def test_killed_in_the_second_stage_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = command_for(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    expected = finish(whole, command=command)
    newest = ""
    for within in (False, True):  # after an epoch, and within the next one
        process = start(out, command=command)
        newest = wait_for_point(out, process, newest, within=within)
        process.kill()
        assert process.communicate(timeout=60) == (None, "")
        assert RunFolder(out).points()[0].name == newest
        assert RunFolder(out / "stage-1").result.is_file()
    assert_same(finish(out, command=command), expected)
    lines = steps_of(out)
    assert lines.count("start") == 3
    assert most_repeated(lines) <= 6
    assert steps_of(out / "stage-1").count("start") == 1

    frozen, tuned = (Checkpoint.load(out / part) for part in ("stage-1", "."))
    assert_same(frozen.model, Checkpoint.load(whole / "stage-1").model)
    assert tuned.start is not None
    assert tuned.start["sha256"] == (Checkpoint.load(whole).start or {})["sha256"]
    assert compared(Result.load(out / "result.json")) == compared(
        Result.load(whole / "result.json")
    )
    given = torch.load(tmp_path / "weights.pt", weights_only=True)
    names = [key for key in given if f"features.network.{key}" in frozen.model]
    assert len(names) == len(given) - 2  # without the classifier
    for key in names:
        assert torch.equal(frozen.model[f"features.network.{key}"], given[key])
    first = next(key for key in names if key.endswith("weight"))
    assert not torch.equal(tuned.model[f"features.network.{first}"], given[first])
