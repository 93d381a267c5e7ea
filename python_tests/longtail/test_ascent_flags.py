"""Epochs with ascents: earlier epochs equal SGD, the cost is counted, and invalid settings are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsam.longtail import Checkpoint, TrainConfig, Trainer, recipe
from fastsam.longtail.data import load_digits_lt
from fastsam.longtail.errors import UsageError
from fastsam.longtail.results import Result

DIGITS = load_digits_lt()
SHORT = {"epochs": 4, "batch_size": 100, "lr": 0.05, "warmup_epochs": 0, "lr_milestones": (2, 3)}
STEPS = 3  # batches per epoch: 276 images


def config_for(optimizer: str, method: str = "ce", **settings: Any) -> TrainConfig:
    return recipe("digits-lt", method, optimizer, **{**SHORT, **settings}).config()


def trained(config: TrainConfig, out: Path | None = None, **options: Any) -> Result:
    return Trainer(config, data=DIGITS, out=out, progress=False, **options).fit()


def costs(result: Result) -> list[float | None]:
    return [record.gradients for record in result.history]


def weights(folder: Path, epoch: int) -> dict[str, Any]:
    return Checkpoint.load(folder / f"epoch-{epoch}.pt").model


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["sam", "asam", "looksam"])
def test_a_late_ascent_begins_as_sgd(optimizer: str, tmp_path: Path) -> None:
    late = config_for(optimizer, ascent_start=2)
    assert late.ascent_start == "2"
    result = trained(late, tmp_path / "late", keep=(2, 3))
    plain = trained(config_for("sgd"), tmp_path / "sgd", keep=(2, 3))
    assert same(weights(tmp_path / "late", 2), weights(tmp_path / "sgd", 2))
    assert not same(weights(tmp_path / "late", 3), weights(tmp_path / "sgd", 3))
    assert costs(plain) == [STEPS] * 4
    later = [2 * STEPS] * 2 if optimizer != "looksam" else [STEPS + 1, STEPS + 1]
    assert costs(result) == [STEPS, STEPS, *later]
    assert result.gradients == sum(costs(result))  # type: ignore[arg-type]


def test_interval_and_stop_are_counted_in_steps_and_epochs() -> None:
    assert costs(trained(config_for("sam", ascent_interval=2))) == [5, 4, 5, 4]
    assert costs(trained(config_for("sam", ascent_start=1, ascent_stop=2))) == [3, 6, 3, 3]
    assert costs(trained(config_for("sam", ascent_start=3, ascent_interval=3))) == [3, 3, 3, 4]


def test_a_run_that_is_cut_resumes_to_the_same_bits_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsam.longtail.training.saving.EPOCH_SECONDS", 0.0)
    config = config_for("sam", ascent_start=2, ascent_interval=2)
    trained(config, tmp_path / "whole")
    for epoch in (1, 2, 3):
        out = tmp_path / f"cut-{epoch}"

        def stop(step: Any, epoch: int = epoch) -> None:
            if step.epoch == epoch + 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trained(config, out, on_step=stop)
        trained(config, out, resume=True)
        assert same(Checkpoint.load(out).model, Checkpoint.load(tmp_path / "whole").model)


def test_names_of_the_first_epoch() -> None:
    def first(method: str, start: str, **settings: Any) -> int:
        config = config_for("sam", method, ascent_start=start, **settings)
        return int(config.parts["optimizer"].first_ascent_epoch(config.run))

    assert first("ce", "0") == 1
    assert first("ce-drw", "defer", defer_epoch=1) == 2
    assert first("ib", "defer", defer_epoch=1) == 2
    assert first("ce", "defer") == first("ce", "drop") == first("ce-drw", "drop") == 3
    assert first("ce", "drop", warmup_epochs=3) == 4
    published = recipe("cifar10-lt", "ce-drw", "sam", ascent_start="defer").config()
    assert published.parts["optimizer"].first_ascent_epoch(published.run) == 161


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ascent_start": 4}, "no epoch would have ascent steps"),
        ({"ascent_start": "2", "ascent_stop": 2}, "no epoch would have ascent steps"),
        ({"ascent_stop": 5}, "ascent_stop must be at most epochs"),
        ({"ascent_start": "soon"}, "unknown ascent_start 'soon'; valid: an epoch, defer, drop"),
        ({"ascent_start": "-1"}, "unknown ascent_start"),
        ({"ascent_interval": 0}, "ascent_interval must be at least 1"),
        (
            {"ascent_start": "drop", "lr_schedule": "cosine"},
            "requires a learning rate that drops after warm-up",
        ),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    schedule = {} if "lr_schedule" in settings else SHORT
    with pytest.raises(UsageError, match=message):
        recipe("digits-lt", "ce", "sam", **{**schedule, "epochs": 4, **settings}).config()


def test_other_optimizers_have_no_ascent() -> None:
    with pytest.raises(UsageError, match="ascent_start requires optimizer asam, looksam, sam"):
        config_for("sgd", ascent_start=2)
    with pytest.raises(UsageError, match="ascent_interval requires optimizer asam, sam"):
        config_for("looksam", ascent_interval=2)


def test_runs_of_older_versions_ascend_throughout() -> None:
    config = config_for("sam")
    new = ("ascent_start", "ascent_interval", "format")
    older = {name: value for name, value in config.as_dict().items() if name not in new}
    assert TrainConfig.from_dict(older) == config
    assert (config.ascent_start, config.ascent_stop, config.ascent_interval) == ("0", None, 1)
