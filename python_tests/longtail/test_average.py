"""The exponential average of the weights: recurrence, evaluation, checkpoints and branches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.build import build_network
from fastsam.longtail.checkpoint import checkpoint_bytes
from fastsam.longtail.data import Images, load_digits_lt
from fastsam.longtail.errors import CheckpointError, UsageError
from fastsam.longtail.predictions import Predictions
from fastsam.longtail.results import Result
from fastsam.longtail.training import Branch, Step
from fastsam.longtail.training.average import JudgedWeights
from fastsam.longtail.training.evaluation import Judge

DIGITS = load_digits_lt()
SHORT = {"epochs": 3, "batch_size": 100, "lr": 0.05, "warmup_epochs": 0, "lr_milestones": (2, 3)}
State = dict[str, Tensor]


def config_for(optimizer: str = "sgd", method: str = "ce", **settings: Any) -> TrainConfig:
    return recipe("digits-lt", method, optimizer, **{**SHORT, **settings}).config()


def trained(config: TrainConfig, out: Path | None = None, **options: Any) -> Result:
    return Trainer(config, data=DIGITS, out=out, progress=False, **options).fit()


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[State]:
    """Record the state of the trained network after every step."""
    states: list[State] = []
    update = JudgedWeights.update

    def recorded(self: JudgedWeights) -> None:
        states.append({name: v.clone() for name, v in self._trained.state_dict().items()})
        update(self)

    monkeypatch.setattr(JudgedWeights, "update", recorded)
    return states


def averaged(first: State, states: list[State], decay: float) -> State:
    """Compute the average by its definition, in float64, without integer buffers."""
    mean = {name: value.double() for name, value in first.items() if value.is_floating_point()}
    for state in states:
        mean = {name: decay * a + (1 - decay) * state[name].double() for name, a in mean.items()}
    return mean


def assert_close(found: State, expected: State) -> None:
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-5, atol=1e-6), name


def accuracy_of(state: State, images: Images) -> float:
    """Compute the accuracy in percent of a network with these weights."""
    network = build_network(config_for(), 10, 1)
    network.load_state_dict(state)
    (batch,) = images.batches([torch.arange(len(images)).numpy()], None, torch.device("cpu"))
    with torch.no_grad():
        right = network.eval()(batch.inputs).argmax(dim=1) == batch.targets
    return 100.0 * float(right.double().mean())


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_the_average_is_evaluated_and_training_continues_from_the_weights(
    optimizer: str, tmp_path: Path, steps: list[State]
) -> None:
    config = config_for(optimizer, ema=0.8)
    run = Trainer(config, data=DIGITS, out=tmp_path / "ema", progress=False)
    result = run.fit()
    kept = Checkpoint.load(tmp_path / "ema")
    assert kept.average is not None
    assert len(steps) == 9
    assert_close(kept.average, averaged(build_network(config, 10, 1).state_dict(), steps, 0.8))
    assert result.rule == "last epoch of the weights averaged with decay 0.8"
    assert same(kept.judged_weights(), kept.average)
    assert same(kept.build_model(judged=True).state_dict(), kept.average)
    assert same(kept.build_model().state_dict(), kept.model)
    assert same(run.judge.network.state_dict(), kept.average)
    assert result.test.accuracy == pytest.approx(accuracy_of(kept.average, DIGITS.test))
    assert DIGITS.validation is not None
    assert result.history[-1].validation_accuracy == pytest.approx(
        accuracy_of(kept.average, DIGITS.validation)
    )
    plain = trained(config_for(optimizer), tmp_path / "plain")
    assert same(Checkpoint.load(tmp_path / "plain").model, kept.model)
    assert [r.loss for r in plain.history] == [r.loss for r in result.history]
    assert plain.rule == "last epoch"
    assert plain.test.accuracy != result.test.accuracy


def test_a_skipped_step_averages_in_the_unchanged_weights(seed: int) -> None:
    config = config_for(ema=0.5)
    network = build_network(config, 10, 1)
    judged = JudgedWeights(network, config)
    first = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape))
    moved = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(2):  # a step, and one that is skipped
        judged.update()
    assert judged.average is not None
    assert_close(judged.average, averaged(first, [moved, moved], 0.5))


def test_integers_are_those_of_the_last_step(seed: int) -> None:
    config = config_for(ema=0.5)
    network = build_network(config, 10, 1)
    network.register_buffer("labels", torch.full((3,), -1))
    judged = JudgedWeights(network, config)
    network.get_buffer("labels").copy_(torch.tensor([7, -1, 2]))
    judged.update()
    assert judged.average is not None
    assert judged.average["labels"].tolist() == [7, -1, 2]


def test_a_decay_of_0_evaluates_the_current_weights(tmp_path: Path) -> None:
    result = trained(config_for(ema=0.0), tmp_path)
    kept = Checkpoint.load(tmp_path)
    assert kept.average is not None
    whole = {name: v for name, v in kept.average.items() if v.is_floating_point()}
    assert all(torch.equal(value, kept.model[name]) for name, value in whole.items())
    assert result.test == trained(config_for()).test


def test_a_run_that_is_killed_resumes_to_the_same_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = config_for("sam", ema=0.9, select="best-validation")
    whole = trained(config, tmp_path / "whole")

    def stop(step: Step) -> None:
        if (step.epoch, step.batch) == (3, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(config, tmp_path / "cut", on_step=stop)
    result = trained(config, tmp_path / "cut", resume=True)
    found, expected = Checkpoint.load(tmp_path / "cut"), Checkpoint.load(tmp_path / "whole")
    for name in ("model", "average", "best"):
        assert same(getattr(found, name), getattr(expected, name)), name
    assert (result.test, result.rule) == (whole.test, whole.rule)
    # A finished run is loaded, not trained.
    assert trained(config, tmp_path / "cut", resume=True).test == whole.test


def test_the_best_epoch_is_chosen_and_kept_by_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(ema=0.8, select="best-validation")
    wrong, judged = iter([90, 40, 80]), []
    judge = Judge.predictions

    def made(self: Judge, images: Images) -> Predictions:
        judged.append({name: v.clone() for name, v in self.network.state_dict().items()})
        share = next(wrong, None)
        if share is None:
            return judge(self, images)
        classes = (torch.arange(100) < share).long()
        return Predictions.of(torch.eye(2)[classes], torch.zeros(100, dtype=torch.int64))

    monkeypatch.setattr(Judge, "predictions", made)
    result = trained(config, tmp_path, keep=(1, 2))
    assert result.rule == "best epoch on validation (2) of the weights averaged with decay 0.8"
    second, last = Checkpoint.load(tmp_path / "epoch-2.pt"), Checkpoint.load(tmp_path)
    assert last.best is not None
    assert second.average is not None
    assert same(last.best, second.average)
    assert not same(last.best, second.model)
    assert same(last.judged_weights(), last.best)
    # Validation of each epoch, then test and validation of the best.
    assert len(judged) == 5
    assert same(judged[1], second.average)
    assert same(judged[3], last.best)


def test_evaluated_weights_without_an_average(tmp_path: Path) -> None:
    trained(config_for(), tmp_path / "last")
    last = Checkpoint.load(tmp_path / "last")
    assert last.average is None
    assert same(last.judged_weights(), last.model)
    trained(config_for(select="best-validation"), tmp_path / "best")
    best = Checkpoint.load(tmp_path / "best")
    assert best.best is not None
    assert same(best.build_model(judged=True).state_dict(), best.best)


def test_branches_go_on_with_begin_and_drop_the_average(tmp_path: Path, steps: list[State]) -> None:
    config = config_for("sam", ema=0.8)
    whole = trained(config, tmp_path / "whole", keep=(1,))
    plain_config = config_for("sam")
    trained(plain_config, tmp_path / "plain", keep=(1,))
    branch, of_plain = Branch.load(tmp_path / "whole", 1), Branch.load(tmp_path / "plain", 1)

    settings, _ = branch.settings()
    assert settings == config
    result = trained(settings, tmp_path / "same", branch=branch)
    found, expected = Checkpoint.load(tmp_path / "same"), Checkpoint.load(tmp_path / "whole")
    assert same(found.average or {}, expected.average or {})
    assert result.test == whole.test

    settings, _ = of_plain.settings(ema=0.8)
    steps.clear()
    trained(settings, tmp_path / "added", branch=of_plain)
    added = Checkpoint.load(tmp_path / "added")
    assert added.average is not None
    assert_close(added.average, averaged(of_plain.checkpoint.model, steps, 0.8))
    assert same(added.model, expected.model)

    settings, _ = branch.settings(ema=None)
    assert settings == plain_config
    dropped = trained(settings, tmp_path / "dropped", branch=branch)
    assert Checkpoint.load(tmp_path / "dropped").average is None
    assert dropped.rule == "last epoch"
    assert same(Checkpoint.load(tmp_path / "dropped").model, expected.model)


def test_the_best_epoch_of_the_parent_keeps_its_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(select="best-validation")
    trained(config, tmp_path / "run", keep=(2,))
    branch = Branch.load(tmp_path / "run", 2)
    record = replace(
        branch.checkpoint.history[0], validation_accuracy=100.0, validation_balanced=100.0
    )
    branch.checkpoint.history[0] = record
    settings, _ = branch.settings(ema=0.8)
    result = trained(settings, branch=branch)
    assert result.rule == "best epoch on validation (1)"


def test_checkpoints_with_and_without_an_average(tmp_path: Path) -> None:
    trained(config_for(epochs=1, lr_milestones=(1, 1)), tmp_path / "old")
    path = tmp_path / "old" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    del content["average"]  # an older version did not write it
    torch.save(content, path)
    old = Checkpoint.load(path)
    assert (old.average, old.config.ema) == (None, None)
    content["config"]["ema"] = 0.9
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"ema is 0\.9, but the file has no average"):
        Checkpoint.load(path)
    del content["config"]["ema"]
    torch.save({**content, "average": {"head.weight": 1.0}}, path)
    with pytest.raises(CheckpointError, match="weight of the network must be a tensor"):
        Checkpoint.load(path)


def test_a_damaged_average_does_not_resume(tmp_path: Path) -> None:
    config = config_for(ema=0.5)
    trained(config, tmp_path)
    kept = Checkpoint.load(tmp_path)
    assert kept.average is not None
    del kept.average["head.weight"]
    kept.save(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="the weights do not fit a resnet8"):
        Trainer(config, data=DIGITS, out=tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("select", ["last", "best-validation"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_sizes_of_checkpoints(select: str, ema: float | None, tmp_path: Path) -> None:
    config = config_for("sam", epochs=1, lr_milestones=(1, 1), select=select, ema=ema)
    run = Trainer(config, data=DIGITS, out=tmp_path, progress=False)
    run.fit()
    size = (tmp_path / "checkpoint.pt").stat().st_size
    assert size <= checkpoint_bytes(config, run.model) <= 1.15 * size


@pytest.mark.parametrize(
    ("decay", "message"),
    [(1.0, r"ema must be below 1, got 1"), (-0.1, "ema must be at least 0"), (1.5, "below 1")],
)
def test_invalid_settings_are_rejected(decay: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config_for(ema=decay)
