"""Plug-ins: discovery by entry points, and training from the command line and Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsam.cli import main
from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.data import Draw
from fastsam.longtail.errors import UsageError
from fastsam.longtail.losses import LOSSES, CrossEntropyLoss, Loss, register_loss
from fastsam.longtail.registry import (
    Registry,
    RunPart,
)
from fastsam.longtail.seeds import Stream, numpy_generator
from fastsam.longtail.settings import Settings, setting
from fastsam.longtail.stage_plan import plan_stages
from fastsam.longtail.trained import TrainedRun, calibrate_run
from python_tests.longtail.plugin_site import MODULES, ROOT, install

MIXERS = ("remix", "balanced-mixup", "unimix")
NAMES = ("stripes", "margin-loss-drw", "averaged-sgd")
SHORT = ("--model", "tiny-net", "--epochs", "2", "--quiet")


def fastsam(*arguments: str, site: Path | None) -> subprocess.CompletedProcess[str]:
    path = [str(ROOT), *([] if site is None else [str(site)])]
    return subprocess.run(
        [sys.executable, "-m", "fastsam", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_command_line_trains_with_all_four(site: Path, tmp_path: Path) -> None:
    data, method, optimizer = NAMES
    out = tmp_path / "run"
    names = ("--data", data, "--method", method, "--optimizer", optimizer)
    done = fastsam(
        "train", *names, *SHORT, "--margin-loss-margin", "0.25", "--out", str(out), site=site
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads((out / "result.json").read_text())["config"]
    assert (stored["margin_loss_margin"], stored["tiny_net_width"]) == (0.25, 16)
    assert stored["plugins"] == {
        "loss margin-loss": "margin_loss",
        "data stripes": "stripes_data",
        "optimizer averaged-sgd": "averaged_sgd",
        "model tiny-net": "tiny_network",
    }
    again = fastsam("train", "--resume", "--quiet", "--out", str(out), site=site)
    assert again.returncode == 0, again.stderr
    spectrum = ("spectrum", str(out), "--classes", "0", "2", "--steps", "3", "--quiet")
    assert fastsam(*spectrum, site=site).returncode == 0
    missing = fastsam(*spectrum, site=None)
    assert missing.returncode == 1
    assert "loss margin-loss of package margin_loss" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.slow
def test_help_shows_the_settings_of_the_named_parts(site: Path) -> None:
    named = fastsam("train", "--method", "margin-loss", "--help", site=site).stdout
    assert "--margin-loss-margin" in named
    assert "--max-margin" not in named
    assert "--tiny-net-width" not in named
    full = fastsam("train", "--help", site=site).stdout
    assert all(option in full for option in ("--margin-loss-margin", "--max-margin", "--rho"))
    assert all(option in full for option in ("--averaged-sgd-trial", "--stripes-noise"))
    listed = fastsam("recipes", "--names", site=site).stdout
    assert all(name in listed for name in MODULES)
    other = fastsam("train", "--method", "margin-loss", "--max-margin", "1", site=site)
    assert other.returncode == 2
    assert "max_margin requires loss ldam, but the run has loss margin-loss" in other.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_python_trains_with_all_four_and_resumes(tmp_path: Path) -> None:
    config = recipe(*NAMES, model="tiny-net", epochs=12, stripes_noise=0.1).config()
    whole = Trainer(config, out=tmp_path / "whole", progress=False)
    result = whole.fit()
    assert result.test.accuracy > 50  # three classes
    assert result.class_names == ["horizontal", "vertical", "diagonal"]

    def stop(record: object) -> None:
        if len(cut.state.history) == 2:
            raise KeyboardInterrupt

    cut = Trainer(config, out=tmp_path / "cut", keep=(1,), on_epoch=stop, progress=False)
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    rest = Trainer(config, out=tmp_path / "cut", resume=True, keep=(1,), progress=False)
    assert len(rest.state.history) == 1
    rest.fit()
    first, second = (Checkpoint.load(tmp_path / name).model for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert TrainConfig.from_dict(config.as_dict()) == config


def own_share(name: str, weight: float, own: int, other: int) -> float:
    """Return the share of an image's own class in the loss, from the formulas of the papers."""
    if name != "remix":
        return weight
    if own / other >= 3 and weight < 0.5:
        return 0.0
    return 1.0 if own / other <= 1 / 3 and 1 - weight < 0.5 else weight


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_mix_as_in_their_papers(name: str) -> None:
    options = {"model": "tiny-net", "epochs": 2, "augment": False, "batch_size": 40}
    config = recipe("stripes", "ce", "sgd", mixer=name, **options).config()
    run = Trainer(config, progress=False)
    counts, images = run.data.counts, run.data.train
    every = images.batches([np.arange(len(images))], None, torch.device("cpu"))
    clean = next(iter(every)).inputs
    (mixed, *_) = run.batches.read(1)
    order = run.batches.sampler.order(1)[: len(mixed.targets)]
    random = numpy_generator(0, Stream.MIX, 1, 0)
    own = counts[images.targets[order]]
    if name == "balanced-mixup":
        partners = run.batches.mixing.sampler.order(1)[: len(order)]
        weights = np.full(len(order), 1 - random.beta(0.2, 1))
    elif name == "unimix":
        chances = own**-0.1 / (own**-0.1).sum()
        partners = order[random.choice(len(order), len(order), p=chances)]
        other = counts[images.targets[partners]]
        weights = random.beta(0.8, 0.8, len(order)) + other / (own + other)
        weights = np.where(weights > 1, weights - 1, weights)
    else:
        partners = order[random.permutation(len(order))]
        weights = np.full(len(order), random.beta(1.0, 1.0))
    for row, (first, second, weight) in enumerate(zip(order, partners, weights, strict=True)):
        expected = weight * clean[first] + (1 - weight) * clean[second]
        assert torch.allclose(mixed.inputs[row], expected, atol=1e-6)
        labels = images.targets[first], images.targets[second]
        assert (mixed.targets[row], mixed.second[row]) == labels
        share = own_share(name, weight, *counts[list(labels)])
        assert float(mixed.share[row]) == pytest.approx(share, abs=1e-6)
    run.fit()


@pytest.mark.usefixtures("installed")
def test_an_optimizer_of_two_passes_makes_two_passes() -> None:
    config = recipe("stripes", "ce", "averaged-sgd", model="tiny-net", epochs=1).config()
    run = Trainer(config, progress=False)
    calls: list[int] = []
    run.model.features.register_forward_hook(lambda *_: calls.append(1))
    batches = list(run.batches.read(1))
    run.model.train()
    seen = list(run.stepper.steps(batches, epoch=1))
    assert len(calls) == 2 * len(seen) == 2 * len(batches)


@pytest.mark.usefixtures("installed")
def test_python_augments_with_a_plugin() -> None:
    config = recipe("stripes", "ce", "sgd", epochs=1, augment="cutout", cutout_size=4).config()
    images = Trainer(config, progress=False).data.train.normalized((0.0,), (1.0,))
    order = [np.arange(len(images))]
    (clean,), (found,) = (
        list(images.batches(order, draw, torch.device("cpu"))) for draw in (None, Draw(0, 1))
    )
    black = (found.inputs == 0).flatten(1)
    assert torch.equal(found.inputs.flatten(1)[~black], clean.inputs.flatten(1)[~black])
    assert black.sum(1).min() >= 4  # in a corner
    assert black.sum(1).max() == 4 * 4
    assert len({tuple(row.tolist()) for row in black}) > len(images) / 2


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run without plug-ins, on data with validation images."""
    out = tmp_path_factory.mktemp("digits")
    config = recipe("digits-lt", "ce", "sgd", epochs=2).config()
    Trainer(config, out=out, progress=False).fit()
    return out


@pytest.mark.slow
def test_the_command_line_calibrates_with_a_plugin(
    site: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ("calibrate", str(digits), "--method", "mean-shift", "--quiet")
    done = fastsam(*named, site=site)
    assert done.returncode == 0, done.stderr
    assert "chosen: mean-shift (share " in done.stdout
    (digits / "calibration.json").unlink()
    assert main(list(named)) == 2  # the plug-in is not installed here
    error = capsys.readouterr().err
    assert "unknown calibrator 'mean-shift'; valid: best, logit-adjustment" in error


@pytest.mark.usefixtures("installed")
def test_python_calibrates_with_a_plugin_and_loads_it(digits: Path, tmp_path: Path) -> None:
    shutil.copy(digits / "checkpoint.pt", tmp_path)
    plain = TrainedRun.load(tmp_path)
    tried = [score.calibrator for score in calibrate_run(plain).scores]
    assert tried == ["none", "logit-adjustment", "mean-shift", "tau-norm", "nearest-class-mean"]
    calibration = calibrate_run(plain, method="mean-shift")
    calibration.save(tmp_path / "calibration.json")
    images = plain.data().train
    share = calibration.parameters["share"]
    batches = [np.arange(len(images))]
    (batch,) = images.batches(batches, None, torch.device("cpu"))
    with torch.no_grad():
        logits = plain.network(batch.inputs)
        found = TrainedRun.load(tmp_path).network(batch.inputs)
    expected = (logits - share * logits.mean(dim=0)) / calibration.temperature
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_broken_plugin_stops_nothing_but_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    install(folder, {"broken": "broken"})
    (folder / "broken.py").write_text("raise RuntimeError('no luck')\n")
    done = fastsam("train", "--method", "nothing", site=folder)
    assert done.returncode == 2
    assert "plug-in broken: RuntimeError: no luck" in done.stderr
    assert "plug-in broken: RuntimeError: no luck (broken)" in fastsam("doctor", site=folder).stdout
    assert fastsam("recipes", "--names", site=folder).returncode == 0


def test_nothing_in_the_package_knows_the_examples() -> None:
    for path in (ROOT / "fastsam").rglob("*.py"):
        text = path.read_text()
        for name in (*(f'"{name}"' for name in MODULES), *MODULES.values()):
            assert name not in text, f"{path} names {name}"


@pytest.mark.slow
def test_importing_the_package_loads_no_plugin(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    install(folder, {"loud": "loud"})
    (folder / "loud.py").write_text("print('loaded')\n")
    done = fastsam(
        "recipes", "--data", "digits-lt", "--method", "ce", "--optimizer", "sgd", site=folder
    )
    assert done.returncode == 0
    assert "loaded" not in done.stdout
    assert "loaded" in fastsam("recipes", "--names", site=folder).stdout


@dataclass(frozen=True, kw_only=True)
class Unprefixed(Settings):
    """Settings without the prefix of their part."""

    sharpness: float = setting("how sharp", default=1.0)


@dataclass(frozen=True, kw_only=True)
class Other(Settings):
    """A setting with another meaning under a registered name."""

    twice_low: int = setting("one meaning", low=0)


@dataclass(frozen=True, kw_only=True)
class Another(Settings):
    """See :class:`Other`."""

    twice_low: int = setting("one meaning", low=1)


def test_names_that_are_taken_or_lack_their_prefix_are_refused() -> None:
    def build(settings: object, classes: object) -> CrossEntropyLoss:
        return CrossEntropyLoss()

    with pytest.raises(ValueError, match="rename it to fresh_loss_sharpness"):
        register_loss(Loss(name="fresh-loss", build=build, settings=Unprefixed, summary=""))
    with pytest.raises(ValueError, match="'ce' is already registered"):
        register_loss(Loss(name="ce", build=build, summary="taken"))
    with pytest.raises(ValueError, match="must be non-empty and without spaces"):
        register_loss(Loss(name="two words", build=build, summary="a space"))
    assert "fresh-loss" not in tuple(LOSSES)
    one, two = Registry[RunPart]("thing"), Registry[RunPart]("other thing")
    one.add(RunPart(name="twice", summary="", build=build, settings=Other))
    with pytest.raises(ValueError, match="differs in type, bounds or help"):
        two.add(RunPart(name="twice", summary="", build=build, settings=Another))


def test_a_rule_is_split_off_only_where_one_has_the_name() -> None:
    from fastsam.longtail.methods import Method

    for name in ("no-loss", "ce-margin"):
        with pytest.raises(UsageError, match=f"unknown method '{name}'"):
            Method.parse(name)
    assert Method.parse("ldam-drw") == Method("ldam", "drw")


@pytest.mark.usefixtures("installed")
def test_a_list_of_stages_is_one_file() -> None:
    config = recipe("digits-lt", "ce", "sam", stages="late-balance").config()
    first, last = plan_stages(config)
    assert (first.config.optimizer, last.config.optimizer) == ("sam", "sgd")
    assert (last.config.method, last.config.epochs, last.config.freeze) == ("bs", 5, ())
    assert config.as_dict()["plugins"] == {"stages late-balance": "late_balance_stages"}
    cifar = recipe("cifar10-lt", "ce", "sam", stages="late-balance").config()
    assert plan_stages(cifar)[1].config.epochs == 10
