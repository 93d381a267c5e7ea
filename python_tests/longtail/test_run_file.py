"""run.yaml: every run writes one, it repeats the run, and invalid content is an error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastsam.cli import main
from fastsam.longtail import recipe
from fastsam.longtail.checkpoint import Checkpoint
from fastsam.longtail.config import TrainConfig, settings_in
from fastsam.longtail.errors import UsageError
from fastsam.longtail.results import Epoch
from fastsam.longtail.run_file import read_run_file, run_file_text

TINY = ["--epochs", "3", "--batch-size", "100", "--quiet"]


def train(*arguments: object) -> int:
    return main(["train", *(str(argument) for argument in arguments)])


def weights(run: Path) -> dict[str, Any]:
    return Checkpoint.load(run / "checkpoint.pt").model


TIMES = dict.fromkeys(["seconds", *(item.name for item in fields(Epoch) if not item.compare)])
"""Entries of an epoch's record that measure the machine."""


def assert_same_run(first: Path, second: Path) -> None:
    one, other = (json.loads((run / "result.json").read_text()) for run in (first, second))
    for name in ("config", "test", "parent"):
        assert one[name] == other[name], name
    for a, b in zip(one["history"], other["history"], strict=True):
        assert {**a, **TIMES} == {**b, **TIMES}
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    options = [
        "--method",
        "ldam-drw",
        "--rho-schedule",
        "deferred",
        "--rho",
        0.02,
        0.3,
        "--keep",
        2,
    ]
    assert train(*options, *TINY, "--lr", 1e-5, "--out", out) == 0
    return out


def test_a_run_is_trained_again(run: Path, tmp_path: Path) -> None:
    assert train("--config", run / "run.yaml", "--quiet", "--out", tmp_path / "again") == 0
    assert_same_run(run, tmp_path / "again")
    assert (tmp_path / "again" / "epoch-2.pt").is_file()
    written = (tmp_path / "again" / "run.yaml").read_text().splitlines()
    assert [line.partition("  #")[0] for line in written] == [
        line.partition("  #")[0] for line in (run / "run.yaml").read_text().splitlines()
    ]


def test_options_override_the_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    options = ["--seed", 5, "--lr", 0.05, "--quiet", "--out", out]
    assert train(f"--config={run / 'run.yaml'}", *options) == 0
    result = json.loads((out / "result.json").read_text())
    before = json.loads((run / "result.json").read_text())["config"]
    assert result["config"] == {**before, "seed": 5, "lr": 0.05}
    assert result["sources"]["lr"] == "given"
    assert result["sources"]["rho"] == str(run / "run.yaml")
    assert result["sources"]["max_margin"] == "Cao et al. 2019 (CIFAR)"


def test_a_branch_is_trained_again(run: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "branch", tmp_path / "again"
    options = ["--optimizer", "sgd", "--quiet", "--out", first]
    assert train("--from", run, "--at", 2, *options) == 0
    assert train("--config", first / "run.yaml", "--quiet", "--out", again) == 0
    assert_same_run(first, again)


def test_a_resumed_run_keeps_its_file(run: Path) -> None:
    before = (run / "run.yaml").read_bytes()
    assert train("--resume", "--quiet", "--out", run) == 0
    assert (run / "run.yaml").read_bytes() == before


def test_a_short_file_takes_the_rest_from_the_recipe(tmp_path: Path) -> None:
    file, out = tmp_path / "short.yaml", tmp_path / "run"
    file.write_text("method: ce\noptimizer: sam\nrho: 0.2\nepochs: 1\nbatch-size: 100\nlr: 1e-1\n")
    assert train("--config", file, "--quiet", "--out", out) == 0
    config = json.loads((out / "result.json").read_text())["config"]
    given = {"rho": 0.2, "epochs": 1, "batch_size": 100, "lr": 0.1}
    assert config == recipe("digits-lt", "ce", "sam", **given).config().as_dict()


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return the error for a file with the given content; nothing is trained."""

    def check(text: str, *options: object) -> str:
        file = tmp_path / "wrong.yaml"
        file.write_text(text)
        assert train("--config", file, "--quiet", "--out", tmp_path / "out", *options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line or options
        assert not (tmp_path / "out").exists()
        return line

    return check


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown setting 'epoch', did you mean 'epochs'?"),
        ("out: runs", "unknown setting 'out'"),
        ("epochs: 3\nepochs: 4", "duplicate key epochs"),
        ("batch_size: 3\nbatch-size: 4", "duplicate key batch_size"),
        ("epochs: {a: 1}", "epochs is {'a': 1}; expected a number"),
        ("epochs:", "epochs is None; expected a number"),
        ("epochs: [1", "is not a YAML file of plain values"),
        ("lr: !!python/object/apply:os.getcwd []", "is not a YAML file of plain values"),
        ("- epochs", "contains no settings; expected lines such as `epochs: 60`"),
        ("", "contains no settings"),
        ("optimizer: sgd\nrho: 0.1", "rho requires optimizer asam"),
        ("optimizer: sgdd", "unknown optimizer 'sgdd', did you mean 'sgd'?"),
        ("at: soon", "at must be a whole number, got 'soon'"),
        ("tags: [1]", "tags must be a string, got 1"),
    ],
)
def test_wrong_files(text: str, message: str, fails: Callable[..., str]) -> None:
    assert message in fails(text, *(["--seed", 0] if "sgdd" in text else []))


@pytest.mark.parametrize("text", ["epochs: ten", "epochs: 1.5", "channels_last: 1", "rho: [a]"])
def test_values_of_a_wrong_type(text: str, fails: Callable[..., str]) -> None:
    name = text.partition(":")[0]
    assert f"{name} must be" in fails(text, "--seed", 0)


def test_a_file_that_cannot_be_used(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    assert train("--config", tmp_path / "none.yaml") == 2
    assert "No such file or directory; pass a file such as the run.yaml" in capsys.readouterr().err
    assert train("--config", run / "run.yaml", "--resume", "--out", run) == 2
    assert "--config cannot be combined with a bare --resume" in capsys.readouterr().err
    assert train("--config", run / "run.yaml", "--optimizer", "sgd") == 2
    line = capsys.readouterr().err
    assert "base_optimizer requires optimizer asam, entropy-sgd, looksam" in line
    assert "but the run has optimizer sgd" in line
    assert f"(with the settings of --config {run / 'run.yaml'})" in line
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert train("--config", run / "run.yaml") == 1
    assert 'needs yaml: pip install ".[longtail]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["no", "1", "1e5", "a: b", " # c", "null", "é 🙂", "a\nb", "\x85\x7f\u2028", '"', "C:\\x"],
)
def test_texts_survive(text: str, tmp_path: Path) -> None:
    """PyYAML must read back the values that were written."""
    config = recipe("folder", "ce", "sgd", data_root=text).config()
    file = tmp_path / "run.yaml"
    file.write_text(run_file_text(config, {"data_root": text}, options={}), "utf-8")
    assert yaml.safe_load(file.read_text("utf-8"))["data_root"] == text
    assert read_run_file(file).settings["data_root"] == text


def test_numbers_survive(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.rand(20, dtype=torch.float64, generator=generator).tolist()
    file = tmp_path / "run.yaml"
    for value in (*digits, 1e-300, 1e22, 5e-324, 1.0, 1e16):
        config = recipe("digits-lt", "ce", "sgd", lr=value).config()
        file.write_text(run_file_text(config, {}, options={}))
        for found in (yaml.safe_load(file.read_text()), read_run_file(file).settings):
            assert math.isclose(found["lr"], value, rel_tol=0, abs_tol=0)
            assert type(found["lr"]) is float


@pytest.mark.parametrize(
    ("data", "method", "optimizer"),
    [
        ("cifar10-lt", "vs-drs", "lpf-sgd"),
        ("imagenet-lt", "paco", "sam"),
        ("digits-lt", "ib", "pgd"),
    ],
)
def test_every_setting_is_there(data: str, method: str, optimizer: str, tmp_path: Path) -> None:
    config = recipe(data, method, optimizer).config()
    file = tmp_path / "run.yaml"
    file.write_text(run_file_text(config, {}, options={"keep": [1], "from": None}, processes=2))
    found = read_run_file(file, options=("keep", "from"))
    assert TrainConfig.create(**found.settings) == config
    assert found.settings.keys() == settings_in(config.as_dict()).keys()
    assert found.options == {"keep": (1,)}
    assert "torchrun --nproc-per-node 2 --no-python fastsam train" in file.read_text()


def test_an_integer_is_a_float_where_the_setting_is(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rho: 1\nimbalance: 10\nascent_start: 3\nlr_factors: [1, 0.5]\n")
    settings = read_run_file(file).settings
    assert settings == {
        "rho": (1.0,),
        "imbalance": 10.0,
        "ascent_start": "3",
        "lr_factors": (1.0, 0.5),
    }
    assert [type(value) for value in (*settings["rho"], settings["imbalance"])] == [float, float]
    file.write_text("rhoo: 1\n")
    with pytest.raises(UsageError, match="unknown setting 'rhoo', did you mean 'rho'"):
        read_run_file(file)
