"""``--profile`` says where the time of 20 steps goes, and writes a trace of them."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.cli import main
from fastsam.longtail import Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.training.profile import StepProfile

DIGITS = load_digits_lt()
PAUSE = 0.02
FAST = ["--method", "ce", "--model", "resnet8", "--batch-size", "256", "--quiet"]


@pytest.mark.parametrize(
    ("optimizer", "sections"),
    [
        ("sgd", {"data", "pass one", "update"}),
        ("sam", {"data", "pass one", "ascent", "pass two", "update"}),
    ],
)
def test_the_sections_of_a_step(optimizer: str, sections: set[str], tmp_path: Path) -> None:
    config = recipe("digits-lt", "ce", optimizer, epochs=16, batch_size=256).config()
    run = Trainer(config, data=DIGITS, profile=tmp_path / "deep" / "folder", progress=False)
    assert run.profile is not None
    update = run.optimizer.step if optimizer == "sgd" else run.optimizer.native_step.descend  # type: ignore[attr-defined]

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(PAUSE)
        return update(*arguments, **options)

    if optimizer == "sgd":
        run.optimizer.step = slow  # type: ignore[method-assign]
    else:
        run.optimizer.native_step.descend = slow  # type: ignore[attr-defined]
    run.fit()
    assert run.steps_per_epoch * 16 > 25
    assert run.profile.steps == 20
    rows = {row.section: row for row in run.profile.rows()}
    assert rows.keys() == sections | {"other", "evaluation"}
    for name in sections - {"data"}:
        assert rows[name].calls == 20, name
    assert rows["update"].seconds >= 20 * PAUSE
    assert rows["evaluation"].share is None
    ends = range(run.steps_per_epoch, 16 * run.steps_per_epoch + 1, run.steps_per_epoch)
    assert rows["evaluation"].calls == 1 + sum(5 <= end < 25 for end in ends)  # the first, too
    assert sum(row.share for row in rows.values() if row.share is not None) == pytest.approx(1)
    events = json.loads(run.profile.trace.read_text())["traceEvents"]
    found = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert {name: found[name] for name in sections - {"data"}} == dict.fromkeys(
        sections - {"data"}, 20
    )
    assert any(event["name"] == "aten::conv2d" for event in events)


def test_a_profile_ends_with_the_run(tmp_path: Path) -> None:
    config = recipe("digits-lt", "ce", "sgd", epochs=4, batch_size=256).config()
    run = Trainer(config, data=DIGITS, profile=tmp_path, progress=False)
    run.fit()
    assert run.profile is not None
    assert run.profile.steps == run.steps_per_epoch * 4 - 5
    assert run.profile.trace.is_file()
    assert sum(row.share or 0 for row in run.profile.rows()) == pytest.approx(1)


def test_profiling_does_not_change_training(tmp_path: Path) -> None:
    config = recipe("digits-lt", "ce", "sam", epochs=2, batch_size=256).config()
    plain = Trainer(config, data=DIGITS, progress=False).fit()
    again = Trainer(config, data=DIGITS, profile=tmp_path, progress=False).fit()
    assert plain.test.nll == again.test.nll


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *FAST, "--epochs", "4", "--profile", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "pass two" in printed
    assert (tmp_path / "run" / "profile" / "trace.json").is_file()
    assert f"trace, for https://ui.perfetto.dev: {Path('run/profile/trace.json')}" in printed
    assert main(["train", *FAST, "--epochs", "1", "--profile", "here"]) == 0
    assert "too short for a profile" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["train", *FAST, "--epochs", "1", "--profile", "file"]) == 1
    assert "file" in capsys.readouterr().err


def test_only_rank_0_profiles(tmp_path: Path) -> None:
    from fastsam.distributed import World

    config = recipe("digits-lt", "ce", "sgd").config()
    run = Trainer(config, data=DIGITS, progress=False)
    device, stepper = run.device, run.stepper
    assert StepProfile.of_run(tmp_path, device, World(1, 2), stepper) is None
    assert StepProfile.of_run(None, device, World(), stepper) is None


def test_what_follows_the_last_step_is_not_part_of_the_steps(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, torch.device("cpu"), warmup=1, steps=20)
    with profile:
        for _ in range(4):
            with profile.section("pass one"):
                time.sleep(PAUSE)
            profile.step()
        profile.finish()
        time.sleep(20 * PAUSE)
    assert profile.steps == 3
    rows = {row.section: row for row in profile.rows()}
    assert rows["pass one"].seconds >= 3 * PAUSE
    assert rows["other"].seconds < 10 * PAUSE
